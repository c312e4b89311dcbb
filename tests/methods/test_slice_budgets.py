"""Dividing a budget by hand and against an exhaustive search."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.errors import WeaverError
from weaver.methods.slice_budgets import ErrorCurve, allocate_slices


def test_the_hull_of_a_convex_curve_is_the_curve() -> None:
    # Linear between the measurements, zero at all 8 slices.
    curve = ErrorCurve((2, 4, 6), (10.0, 4.0, 1.0), 8)
    assert curve.hull() == [10.0, 7.0, 4.0, 2.5, 1.0, 0.5, 0.0]
    assert [curve.at(slices) for slices in (1, 2, 5, 8)] == [10.0, 10.0, 2.5, 0.0]


def test_points_above_the_hull_do_not_count() -> None:
    # From (2, 10) to (6, 2) is -2 a slice, which passes below (4, 9); (6, 2) stays.
    curve = ErrorCurve((2, 4, 6), (10.0, 9.0, 2.0), 8)
    assert curve.hull() == [10.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.0]
    # One straight line to the end where everything lies above it.
    assert ErrorCurve((2, 3), (4.0, 3.9), 4).hull() == [4.0, 2.0, 0.0]


def test_an_error_that_rises_is_not_believed() -> None:
    curve = ErrorCurve((1, 2, 3), (0.0, 5.0, 0.0), 4)
    assert curve.hull() == [0.0, 0.0, 0.0, 0.0]


STEEP = ErrorCurve((1, 2, 3), (9.0, 4.0, 1.0), 4)  # gains 5, 3, 1
FLAT = ErrorCurve((1, 2, 3), (5.0, 3.0, 1.5), 4)  # gains 2, 1.5, 1.5


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2.0, [1, 1]),
        (2.9, [1, 1]),
        (3.0, [2, 1]),
        (4.0, [3, 1]),
        (5.0, [3, 2]),
        (6.0, [3, 3]),
        (7.0, [3, 4]),
        (8.0, [4, 4]),
        (99.0, [4, 4]),
    ],
)
def test_slices_go_where_they_gain_most(budget: float, expected: list[int]) -> None:
    assert allocate_slices([STEEP, FLAT], 1.0, 0.0, budget) == expected


def test_routers_are_paid_for_and_a_full_layer_needs_none() -> None:
    # Two routers of 0.5: five slices cost 6.
    assert allocate_slices([STEEP, FLAT], 1.0, 0.5, 5.4) == [3, 1]
    assert allocate_slices([STEEP, FLAT], 1.0, 0.5, 6.0) == [3, 2]
    # The last slice of a layer gives its router back: 3 + 3 slices cost 7, 3 + 4 cost 7.5.
    assert allocate_slices([STEEP, FLAT], 1.0, 0.5, 7.4) == [3, 3]
    assert allocate_slices([STEEP, FLAT], 1.0, 0.5, 7.5) == [3, 4]


def test_a_slice_that_does_not_fit_does_not_stop_the_others() -> None:
    # At 3 + 1 slices the second one of the flat layer gains more, but costs 1 instead of 0.5.
    assert allocate_slices([STEEP, FLAT], 1.0, 0.5, 5.9) == [4, 1]
    # At 3 + 3 slices all is spent: a fourth one of five does not fit, the last one costs nothing.
    steeper = ErrorCurve((1, 2, 3), (90.0, 40.0, 10.0), 5)
    flat = ErrorCurve((3,), (1.0,), 4)
    assert allocate_slices([steeper, flat], 1.0, 1.0, 8.0) == [3, 4]


def test_a_budget_below_the_smallest_sizes_is_refused() -> None:
    with pytest.raises(WeaverError, match=r"the smallest layers cost 3 of a budget of 2\.5") as e:
        allocate_slices([STEEP, FLAT], 1.0, 0.5, 2.5)
    assert e.value.fix == "--allocation uniform, or a lower --sparsity"


# Gains of each layer's second, third and fourth slice; whole numbers keep sums exact.
GAINS = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=3)


@given(GAINS, st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_it_is_the_best_division_of_convex_curves(gains: list[list[int]], more: int) -> None:
    curves = []
    for layer in gains:
        first, second, third = sorted(layer, reverse=True)
        errors = (first + second + third, second + third, third)
        curves.append(ErrorCurve((1, 2, 3), tuple(float(error) for error in errors), 4))
    budget = float(len(curves) + more)

    chosen = allocate_slices(curves, 1.0, 0.0, budget)

    def total(counts: tuple[int, ...]) -> float:
        return sum(curve.at(count) for curve, count in zip(curves, counts, strict=True))

    assert sum(chosen) <= budget
    possible = [c for c in product(range(1, 5), repeat=len(curves)) if sum(c) <= budget]
    assert total(tuple(chosen)) == pytest.approx(min(total(counts) for counts in possible))
