"""Layers to split: built by hand from statistics, or from random weights and tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.algorithms.statistics import LayerStatistics, sample_positions
from weaver.artifacts.types import LayerProfile
from weaver.methods.base import LayerProblem

ProfileMaker = Callable[..., LayerProfile]
ProblemMaker = Callable[..., LayerProblem]
RandomProblemMaker = Callable[..., tuple[LayerProblem, Tensor]]


def _samples(given: dict[str, Tensor]) -> int:
    known = given.get("sample_gate_abs_mean_MF")
    return 1 if known is None else known.shape[0]


def _profile(neurons: int, **given: Tensor) -> LayerProfile:
    fields: dict[str, Tensor] = {
        "sample_gate_mean_MF": torch.zeros(_samples(given), neurons),
        "hidden_mean_F": torch.zeros(neurons),
        "hidden_variance_F": torch.ones(neurons),
        "marker_neurons_TA": torch.zeros(1, 1, dtype=torch.int32),
        "ffn_inputs_ND": torch.zeros(0, 2),
    } | given
    samples = fields["sample_gate_mean_MF"].shape[0]
    fields.setdefault("sample_gate_abs_mean_MF", fields["sample_gate_mean_MF"].abs())
    fields.setdefault("sample_tokens_M", torch.ones(samples, dtype=torch.int64))
    fields.setdefault("sample_groups_M", torch.arange(samples))
    return LayerProfile(tokens=fields["marker_neurons_TA"].shape[0], **fields)


def _problem(
    profile: LayerProfile,
    *,
    active_neurons: int,
    num_experts: int = 0,
    expert_width: int = 0,
    weights: GluWeights | None = None,
) -> LayerProblem:
    if weights is None:
        rows_FD = torch.ones(profile.intermediate_size, 2)
        weights = GluWeights(rows_FD, rows_FD, rows_FD, "silu")
    return LayerProblem(3, weights, profile, active_neurons, num_experts, expert_width)


def _random_problem(
    seed: int, *, neurons: int, active_neurons: int, num_experts: int = 0, expert_width: int = 0
) -> tuple[LayerProblem, Tensor]:
    """A layer with random weights profiled on random tokens, and those tokens, (T, D)."""
    generator = torch.Generator().manual_seed(seed)
    gate_FD, up_FD, down_FD = torch.randn(3, neurons, 6, generator=generator)
    weights = GluWeights(gate_FD, up_FD, down_FD, "silu")
    x_TD = torch.randn(96, 6, generator=generator) + 0.5
    statistics = LayerStatistics(weights, 6, 4, sample_positions(96, 20, generator))
    statistics.update(x_TD, torch.arange(96) // 16)
    profile = statistics.finish(torch.arange(6) // 2)
    problem = _problem(
        profile,
        active_neurons=active_neurons,
        num_experts=num_experts,
        expert_width=expert_width,
        weights=weights,
    )
    return problem, x_TD


@pytest.fixture(scope="session")
def make_profile() -> ProfileMaker:
    """``make_profile(F, field=tensor, ...)``: a profile with plain values for what is not given."""
    return _profile


@pytest.fixture(scope="session")
def make_problem() -> ProblemMaker:
    """``make_problem(profile, active_neurons=..., ...)``: a layer with weights of ones."""
    return _problem


@pytest.fixture(scope="session")
def random_problem() -> RandomProblemMaker:
    """``random_problem(seed, neurons=..., ...)``: a layer with its calibration tokens."""
    return _random_problem
