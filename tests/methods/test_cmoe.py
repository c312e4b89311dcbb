"""CMoE: a worked example, and recovery of planted experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from weaver.errors import WeaverError
from weaver.methods import random_split
from weaver.methods.cmoe import CmoeOptions, partition

Maker = Callable[..., Any]
GENERATOR = torch.Generator().manual_seed(0)

# 8 neurons; 0 and 7 mark every token, (1, 4), (2, 5) and (3, 6) mark the same ones.
MARKERS_TA = torch.tensor([[0, 7, 1, 4], [0, 7, 2, 5], [0, 7, 3, 6]], dtype=torch.int32)


def test_by_hand(make_profile: Maker, make_problem: Maker) -> None:
    profile = make_profile(8, marker_neurons_TA=MARKERS_TA)
    # S1A2E4: 3 active experts of 2 neurons, floor(3 / 2) = 1 of them shared.
    problem = make_problem(profile, active_neurons=6, num_experts=4, expert_width=2)
    layout = partition(problem, CmoeOptions(), GENERATOR)
    assert layout.shared_S.tolist() == [0, 7]
    assert layout.experts_EN.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert layout.top_k == 2


@pytest.mark.parametrize(
    ("active_experts", "shared", "top_k"), [(6, 3, 3), (4, 2, 2), (7, 3, 4), (1, 0, 1)]
)
def test_default_shared_experts(
    random_problem: Maker, active_experts: int, shared: int, top_k: int
) -> None:
    problem, _ = random_problem(
        0, neurons=32, active_neurons=4 * active_experts, num_experts=8, expert_width=4
    )
    layout = partition(problem, CmoeOptions(), GENERATOR)
    assert (layout.num_shared_neurons, layout.top_k) == (4 * shared, top_k)
    assert layout.num_routed_experts == 8 - shared


def planted_markers(experts: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens that each mark the leader of one expert and 5 of its members; and labels, (F,)."""
    order_F = torch.randperm(experts * width, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    rows = []
    for token in range(60 * experts):
        members_N = order_F.view(experts, width)[token % experts]
        others = 1 + torch.randperm(width - 1, generator=generator)[:5]
        rows.append(members_N[torch.cat([torch.zeros(1, dtype=torch.int64), others])])
    labels_F = torch.empty_like(order_F)
    labels_F[order_F] = torch.arange(experts * width) // width
    return torch.stack(rows).int(), labels_F


@pytest.mark.parametrize("iterations", [1, 3])
def test_planted_experts_are_recovered_and_random_is_not(
    make_profile: Maker, make_problem: Maker, iterations: int
) -> None:
    markers_TA, labels_F = planted_markers(experts=8, width=12)
    profile = make_profile(96, marker_neurons_TA=markers_TA)
    problem = make_problem(profile, active_neurons=48, num_experts=8, expert_width=12)
    options = CmoeOptions(shared_experts=0, iterations=iterations)
    found_EN = labels_F[partition(problem, options, GENERATOR).experts_EN]
    assert bool((found_EN == found_EN[:, :1]).all())
    random = random_split.partition(problem, random_split.RandomOptions(), GENERATOR)
    random_EN = labels_F[random.experts_EN]
    assert not bool((random_EN == random_EN[:, :1]).all())


def test_no_routed_expert_is_refused(random_problem: Maker) -> None:
    problem, _ = random_problem(0, neurons=32, active_neurons=8, num_experts=8, expert_width=4)
    with pytest.raises(WeaverError, match="2 active experts of 8, of which 2 would be shared"):
        partition(problem, CmoeOptions(shared_experts=2), GENERATOR)
