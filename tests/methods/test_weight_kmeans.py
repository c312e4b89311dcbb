"""Clustering of up-projection rows: directions count, lengths do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from weaver.algorithms.glu import GluWeights
from weaver.methods.weight_kmeans import WeightKmeansOptions, partition

Maker = Callable[..., Any]


def test_planted_directions_are_recovered(make_profile: Maker, make_problem: Maker) -> None:
    labels_F = torch.arange(4).repeat(8)
    generator = torch.Generator().manual_seed(0)
    length_F1 = 10 ** torch.randn(32, 1, generator=generator)
    up_FD = torch.randn(4, 6, generator=generator)[labels_F] * length_F1
    weights = GluWeights(torch.ones(32, 6), up_FD, torch.ones(32, 6), "silu")
    problem = make_problem(
        make_profile(32), active_neurons=16, num_experts=4, expert_width=8, weights=weights
    )
    layout = partition(problem, WeightKmeansOptions(), generator)
    assert layout.experts_EN.tolist() == [list(range(e, 32, 4)) for e in range(4)]
    assert (layout.num_shared_neurons, layout.top_k) == (0, 2)


def test_shared_neurons_have_the_strongest_gates(make_profile: Maker, make_problem: Maker) -> None:
    # F = 7 in 3 slices of 2, one left over: the strongest 1 + 2 neurons are shared.
    profile = make_profile(
        7, sample_gate_abs_mean_MF=torch.tensor([[1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0]])
    )
    problem = make_problem(profile, active_neurons=5, num_experts=3, expert_width=2)
    layout = partition(problem, WeightKmeansOptions(shared_experts=1), torch.Generator())
    assert layout.shared_S.tolist() == [1, 3, 5]
    assert (layout.num_routed_experts, layout.top_k, layout.active_neurons) == (2, 1, 5)
