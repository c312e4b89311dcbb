"""The static methods: FLAP and Wanda-sp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.methods import flap, wanda_sp
from weaver.methods.base import LayerProblem

GENERATOR = torch.Generator()

# Four neurons. FLAP: Var * ||Wd||^2 = 1*25, 4*1, 0*100, 3*4 = 25, 4, 0, 12.
# Wanda-sp over 4 tokens: 2 sqrt(Var + mean^2) * mean|Wd| = 2*1*3.5, 2*2*.5, 2*6*5, 2*2*1
# = 7, 2, 60, 4.
DOWN_FD = torch.tensor([[3.0, -4.0], [1.0, 0.0], [0.0, 10.0], [2.0, 0.0]])
VARIANCE_F = torch.tensor([1.0, 4.0, 0.0, 3.0])
MEAN_F = torch.tensor([0.0, 0.0, 6.0, 1.0])


@pytest.fixture
def problem(
    make_profile: Callable[..., LayerProfile], make_problem: Callable[..., LayerProblem]
) -> LayerProblem:
    profile = make_profile(
        4,
        hidden_mean_F=MEAN_F,
        hidden_variance_F=VARIANCE_F,
        marker_neurons_TA=torch.zeros(4, 1, dtype=torch.int32),
    )
    weights = GluWeights(torch.ones(4, 2), torch.ones(4, 2), DOWN_FD, "silu")
    return make_problem(profile, active_neurons=2, weights=weights)


def run_flap(problem: LayerProblem) -> ExpertLayout:
    return flap.partition(problem, flap.FlapOptions(), GENERATOR)


def run_wanda(problem: LayerProblem) -> ExpertLayout:
    return wanda_sp.partition(problem, wanda_sp.WandaSpOptions(), GENERATOR)


def test_flap_by_hand(problem: LayerProblem) -> None:
    layout = run_flap(problem)
    assert layout.shared_S.tolist() == [0, 3]
    assert layout.top_k == 0
    assert layout.experts_EN.shape == (0, 0)
    # dropped 1 and 2: 0 * (1, 0) + 6 * (0, 10)
    assert layout.output_bias_D is not None
    assert layout.output_bias_D.tolist() == [0.0, 60.0]


def test_wanda_sp_by_hand_differs_from_flap(problem: LayerProblem) -> None:
    scores_F = wanda_sp.shared_scores(problem, wanda_sp.WandaSpOptions())
    torch.testing.assert_close(scores_F, torch.tensor([7.0, 2.0, 60.0, 4.0]))
    layout = run_wanda(problem)
    # Neuron 2 is large but constant: only FLAP can do without it.
    assert layout.shared_S.tolist() == [0, 2]
    assert layout.output_bias_D is None


@given(st.integers(0, 2**31), st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_flap_bias_makes_the_mean_error_zero(random_problem: Any, seed: int, active: int) -> None:
    problem, x_TD = random_problem(seed, neurons=10, active_neurons=active)
    layout = run_flap(problem)
    assert layout.output_bias_D is not None
    dense_TD = glu_forward(x_TD, problem.weights)
    kept_TD = glu_forward(x_TD, problem.weights.select(layout.shared_S))
    error_D = (kept_TD + layout.output_bias_D - dense_TD).mean(0)
    torch.testing.assert_close(error_D, torch.zeros(6), atol=1e-4, rtol=0)
    uncorrected_D = (kept_TD - dense_TD).mean(0)
    assert float(uncorrected_D.abs().max()) > 1e-3


@pytest.mark.parametrize("run", [run_flap, run_wanda])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_permuting_the_neurons_permutes_the_choice(
    random_problem: Any, run: Callable[[LayerProblem], ExpertLayout], seed: int
) -> None:
    problem, _ = random_problem(seed, neurons=12, active_neurons=5)
    order_F = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    profile = replace(
        problem.profile,
        hidden_mean_F=problem.profile.hidden_mean_F[order_F],
        hidden_variance_F=problem.profile.hidden_variance_F[order_F],
    )
    permuted = replace(problem, weights=problem.weights.select(order_F), profile=profile)
    kept_S = order_F[run(permuted).shared_S].sort().values
    assert torch.equal(kept_S, run(problem).shared_S)
