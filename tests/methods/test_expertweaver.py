"""ExpertWeaver: the layer-adaptive ratio by hand, and recovery of planted experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from weaver.artifacts.types import LayerProfile
from weaver.errors import WeaverError
from weaver.methods.base import LayerProblem
from weaver.methods.expertweaver import (
    ExpertWeaverOptions,
    coefficient_of_variation,
    partition,
    shared_expert_count,
)

Maker = Callable[..., Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_variation_by_hand(make_profile: Maker) -> None:
    # Over the tasks: (1, 3) has mean 2 and std 1; (0, 2) mean 1, std 1; (-2, 0) mean -1, std 1.
    profile = make_profile(3, sample_gate_mean_MF=torch.tensor([[1.0, 0.0, -2.0], [3.0, 2.0, 0.0]]))
    torch.testing.assert_close(
        coefficient_of_variation(profile, 1e-9), torch.tensor([0.5, 1.0, -1.0])
    )
    # eps joins the mean: 1 / (2 + 2), 1 / (1 + 2), 1 / (-1 + 2)
    torch.testing.assert_close(
        coefficient_of_variation(profile, 2.0), torch.tensor([0.25, 1 / 3, 1.0])
    )


def test_variation_runs_over_tasks_not_samples(make_profile: Maker) -> None:
    # Task 7 has the samples 0 and 2, mean 1; task 4 has the sample 3: mean 2, std 1 over the tasks.
    sample_gate_mean_MF = torch.tensor([[0.0], [3.0], [2.0]])
    grouped = make_profile(
        1, sample_gate_mean_MF=sample_gate_mean_MF, sample_groups_M=torch.tensor([7, 4, 7])
    )
    assert float(coefficient_of_variation(grouped, 1e-9)) == pytest.approx(0.5)
    # With a single task the samples stand in: mean 5/3, variance (25 + 16 + 1) / 27 = 14/9.
    single = make_profile(
        1, sample_gate_mean_MF=sample_gate_mean_MF, sample_groups_M=torch.tensor([2, 2, 2])
    )
    assert float(coefficient_of_variation(single, 1e-9)) == pytest.approx((14 / 9) ** 0.5 / (5 / 3))


def test_one_sample_is_refused_unless_the_ratio_is_given(
    make_profile: Maker, make_problem: Maker
) -> None:
    problem = make_problem(make_profile(8), active_neurons=6, num_experts=4, expert_width=2)
    with pytest.raises(WeaverError, match="1 calibration sample"):
        shared_expert_count(problem, ExpertWeaverOptions())
    assert shared_expert_count(problem, ExpertWeaverOptions(shared_ratio=0.25)) == 1


def specialised_profile(make_profile: Maker, specialised: int) -> LayerProfile:
    """8 neurons: the first ones with the tasks (0, 2), CV 1; the others with (1, 1), CV 0."""
    gate_MF = torch.ones(2, 8)
    gate_MF[0, :specialised] = 0.0
    gate_MF[1, :specialised] = 2.0
    profile: LayerProfile = make_profile(8, sample_gate_mean_MF=gate_MF)
    return profile


@pytest.mark.parametrize(
    ("specialised", "active_neurons", "expected"),
    [
        (8, 6, 1),  # alpha 0.2, 1.6 -> 2 neurons -> 1 expert
        (4, 6, 2),  # alpha 0.45, 3.6 -> 4 neurons -> 2 experts
        (0, 6, 2),  # alpha 0.7, 5.6 -> 6 neurons -> 3 experts, clamped to 3 - 1
        (0, 2, 0),  # one active expert, which must be a routed one
    ],
)
def test_shared_experts_by_hand(
    make_profile: Maker,
    make_problem: Maker,
    specialised: int,
    active_neurons: int,
    expected: int,
) -> None:
    problem = make_problem(
        specialised_profile(make_profile, specialised),
        active_neurons=active_neurons,
        num_experts=4,
        expert_width=2,
    )
    assert shared_expert_count(problem, ExpertWeaverOptions()) == expected


def test_leftover_neurons_count_as_shared(make_profile: Maker, make_problem: Maker) -> None:
    # F = 8 in 3 experts of 2: 2 left over. alpha 0.45: 4 neurons, 2 beyond the leftover: 1 expert.
    problem = make_problem(
        specialised_profile(make_profile, 4), active_neurons=6, num_experts=3, expert_width=2
    )
    assert shared_expert_count(problem, ExpertWeaverOptions()) == 1
    layout = partition(problem, ExpertWeaverOptions(), seeded())
    assert (layout.num_shared_neurons, layout.num_routed_experts, layout.top_k) == (4, 2, 1)
    assert layout.active_neurons == 6


def planted_problem(make_profile: Maker, make_problem: Maker) -> tuple[LayerProblem, torch.Tensor]:
    """64 neurons: 16 always strong, and 6 groups of 8 with a profile of their own; (F,) labels."""
    labels_F = torch.tensor([-1] * 16 + [e for e in range(6) for _ in range(8)])
    labels_F = labels_F[torch.randperm(64, generator=seeded(1))]
    patterns_EM = torch.randn(7, 12, generator=seeded(2))
    gate_FM = patterns_EM[labels_F] + 0.02 * torch.randn(64, 12, generator=seeded(3))
    strength_F = torch.where(labels_F < 0, 5.0, 1.0)
    profile = make_profile(
        64,
        sample_gate_mean_MF=gate_FM.T.contiguous(),
        sample_gate_abs_mean_MF=strength_F.repeat(12, 1),
    )
    return make_problem(profile, active_neurons=48, num_experts=8, expert_width=8), labels_F


@pytest.mark.parametrize("seed", range(4))
def test_planted_experts_are_recovered(make_profile: Maker, make_problem: Maker, seed: int) -> None:
    problem, labels_F = planted_problem(make_profile, make_problem)
    layout = partition(problem, ExpertWeaverOptions(shared_ratio=0.25), seeded(seed))
    assert bool((labels_F[layout.shared_S] == -1).all())
    found_EN = labels_F[layout.experts_EN]
    assert bool((found_EN == found_EN[:, :1]).all())
    assert sorted(found_EN[:, 0].tolist()) == list(range(6))
    # canonical: experts by their lowest neuron, neurons ascending
    assert layout.experts_EN[:, 0].tolist() == sorted(layout.experts_EN[:, 0].tolist())
    assert (layout.top_k, layout.active_neurons) == (4, 48)


def test_all_experts_active_is_refused(make_profile: Maker, make_problem: Maker) -> None:
    problem = make_problem(
        specialised_profile(make_profile, 4), active_neurons=8, num_experts=4, expert_width=2
    )
    with pytest.raises(WeaverError, match="layer 3 has 4 active experts of 4"):
        partition(problem, ExpertWeaverOptions(), seeded())


def test_options_are_checked() -> None:
    with pytest.raises(ValidationError, match=r"a_min=0\.8 is above a_max=0\.7"):
        ExpertWeaverOptions(a_min=0.8)
