"""KL between two measured settings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weaver.evaluation.frontier import kl_at_flops

POINTS = [(0.70, 0.20), (0.78, 0.10), (0.61, 0.60)]


def test_between_two_settings_the_logarithm_is_linear() -> None:
    assert kl_at_flops(POINTS, 0.74) == pytest.approx(math.sqrt(0.2 * 0.1))
    assert kl_at_flops(POINTS, 0.70) == pytest.approx(0.2)
    assert kl_at_flops(POINTS, 0.655) == pytest.approx(math.sqrt(0.6 * 0.2))


def test_nothing_is_extrapolated() -> None:
    assert kl_at_flops(POINTS, 0.784) == 0.10
    assert kl_at_flops(POINTS, 0.80) is None
    assert kl_at_flops(POINTS, 0.48) is None
    assert kl_at_flops([(0.5, 1.3), (0.7, 0.4)], 0.6) is None
    assert kl_at_flops([(0.5, 1.3)], 0.504) == 1.3
    assert kl_at_flops([], 0.5) is None


@given(st.floats(0.61, 0.78))
def test_it_lies_between_its_neighbours(flops: float) -> None:
    found = kl_at_flops(POINTS, flops)
    assert found is not None
    assert 0.1 - 1e-9 <= found <= 0.6 + 1e-9


def test_a_kl_of_zero_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="not positive"):
        kl_at_flops([(0.5, 0.0)], 0.5)
