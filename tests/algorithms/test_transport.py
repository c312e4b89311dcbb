"""The transport solver: exact against scipy, on ordinary and on degenerate costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from weaver.algorithms.transport import Floats, solve_transport


def scipy_cost(cost_FE: Floats, capacity: int) -> float:
    expanded_FF = np.repeat(cost_FE, capacity, axis=1)
    rows, columns = linear_sum_assignment(expanded_FF)
    return float(expanded_FF[rows, columns].sum())


def plan_cost(cost_FE: Floats, capacity: int) -> float:
    owner_F = solve_transport(cost_FE, capacity).owner_F
    assert (np.bincount(owner_F, minlength=cost_FE.shape[1]) == capacity).all()
    return float(np.take_along_axis(cost_FE, owner_F[:, None], axis=1).sum())


@given(
    clusters=st.integers(1, 7),
    capacity=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([0, 2, 5]),
)
@settings(max_examples=150, deadline=None)
def test_cost_equals_scipys_optimum(clusters: int, capacity: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (clusters * capacity, clusters)
    # A few integer levels make most of the costs tie.
    cost_FE = rng.integers(0, levels, shape).astype(float) if levels else rng.normal(size=shape)
    assert plan_cost(cost_FE, capacity) == pytest.approx(scipy_cost(cost_FE, capacity), abs=1e-9)


@pytest.mark.parametrize(("points", "clusters"), [(1024, 16), (1536, 64)])
def test_clustered_costs_reach_scipys_optimum(points: int, clusters: int) -> None:
    rng = np.random.default_rng(0)
    points_FM = (
        rng.normal(size=(points, 8)) + 3 * rng.normal(size=(5, 8))[rng.integers(0, 5, points)]
    )
    centroids_EM = points_FM[:clusters]
    cost_FE = ((points_FM[:, None] - centroids_EM) ** 2).sum(-1)
    optimum = scipy_cost(cost_FE, points // clusters)
    assert plan_cost(cost_FE, points // clusters) == pytest.approx(optimum, rel=1e-12)


@pytest.mark.parametrize(
    "cost_FE",
    [
        np.zeros((256, 8)),
        np.tile(np.arange(8.0), (256, 1)),
        np.random.default_rng(0).random((256, 8)) ** 20 * 1e12,
        np.random.default_rng(0).random((256, 8)) + 1e6,
    ],
    ids=["equal", "identical-rows", "wide-range", "far-from-zero"],
)
def test_degenerate_costs_reach_the_optimum(cost_FE: Floats) -> None:
    assert plan_cost(cost_FE, 32) == pytest.approx(scipy_cost(cost_FE, 32), rel=1e-8)


def test_prices_prove_the_optimum() -> None:
    cost_FE = np.random.default_rng(1).normal(size=(200, 5))
    plan = solve_transport(cost_FE, 40)
    priced_FE = cost_FE + plan.prices_E
    paid_F = np.take_along_axis(priced_FE, plan.owner_F[:, None], axis=1)[:, 0]
    # Complementary slackness: no point would rather be elsewhere at these prices.
    assert (paid_F <= priced_FE.min(axis=1) + 1e-9).all()


def test_a_start_changes_the_time_and_not_the_cost() -> None:
    rng = np.random.default_rng(2)
    cost_FE = rng.normal(size=(240, 6))
    nearby_FE = cost_FE + 0.1 * rng.normal(size=cost_FE.shape)
    warm = solve_transport(nearby_FE, 40, solve_transport(cost_FE, 40).prices_E)
    warm_cost = float(np.take_along_axis(nearby_FE, warm.owner_F[:, None], axis=1).sum())
    assert warm_cost == pytest.approx(plan_cost(nearby_FE, 40), rel=1e-12)
