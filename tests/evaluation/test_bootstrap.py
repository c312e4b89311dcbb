"""Bootstrap intervals: known cases and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.evaluation.bootstrap import bootstrap_interval, paired_bootstrap


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_equal_values_have_no_spread() -> None:
    assert bootstrap_interval([2.5] * 7, seeded()) == (2.5, 2.5, 2.5)


def test_interval_is_close_to_the_normal_one() -> None:
    values = torch.randn(400, generator=seeded(1), dtype=torch.float64).tolist()
    mean, low, high = bootstrap_interval(values, seeded(), samples=2000)
    error = torch.tensor(values).std().item() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)


def test_pairs_show_a_difference_that_the_spread_hides() -> None:
    hard = torch.linspace(0.0, 10.0, 50).tolist()
    mean, low, high = paired_bootstrap([h + 0.1 for h in hard], hard, seeded())
    assert mean == pytest.approx(0.1, abs=1e-5)
    assert low == pytest.approx(0.1, abs=1e-5)
    assert high == pytest.approx(0.1, abs=1e-5)
    _, low_alone, high_alone = bootstrap_interval(hard, seeded())
    assert high_alone - low_alone > 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 10))
def test_interval_lies_within_the_values_and_repeats(values: list[float], seed: int) -> None:
    mean, low, high = bootstrap_interval(values, seeded(seed), samples=50)
    slack = 1e-9
    assert min(values) - slack <= low <= high <= max(values) + slack
    assert min(values) - slack <= mean <= max(values) + slack
    assert bootstrap_interval(values, seeded(seed), samples=50) == (mean, low, high)


def test_paired_difference_changes_sign_with_the_order() -> None:
    a, b = [1.0, 2.0, 4.0], [0.5, 2.5, 1.0]
    mean, low, high = paired_bootstrap(a, b, seeded())
    assert mean == pytest.approx(1.0)
    assert paired_bootstrap(b, a, seeded()) == pytest.approx((-mean, -high, -low))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_interval([], seeded())
    with pytest.raises(ValueError, match="0 samples"):
        bootstrap_interval([1.0], seeded(), samples=0)
    with pytest.raises(ValueError, match="differ in number: 1 and 2"):
        paired_bootstrap([1.0], [1.0, 2.0], seeded())
