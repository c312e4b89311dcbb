"""Expert width and active neurons by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.errors import WeaverError
from weaver.methods.allocation import active_neurons, adaptive_active_neurons, plan_width


def test_width_by_hand() -> None:
    assert plan_width(1536, 8, 1) == 192
    assert plan_width(1536, 64, 1) == 24
    # 4864 / 60 = 81.07 -> 80, 64 left over
    assert plan_width(4864, 60, 16) == 80
    assert plan_width(1536, 64, 16) == 16


def test_width_errors_say_what_would_fit() -> None:
    with pytest.raises(WeaverError, match="1536 neurons do not divide into 10 experts") as caught:
        plan_width(1536, 10, 1)
    assert "the nearest divisors are 8 and 12" in caught.value.why
    assert "--expert-width-multiple 64" in caught.value.fix
    with pytest.raises(WeaverError, match="an expert would be empty"):
        plan_width(96, 8, 16)
    with pytest.raises(WeaverError, match="an expert would be empty"):
        plan_width(4, 8, 1)
    with pytest.raises(WeaverError, match="num_experts=1"):
        plan_width(96, 1, 1)
    with pytest.raises(WeaverError, match="7 neurons do not divide into 3") as caught:
        plan_width(7, 3, 1)
    assert "the nearest divisors are 7 and 7" in caught.value.why


def test_active_neurons_by_hand() -> None:
    assert active_neurons(1536, 8, 192, 0.25) == 6 * 192
    assert active_neurons(1536, 8, 192, 0.125) == 7 * 192
    # 64 left over: (3648 - 64) / 80 = 44.8 -> 45 slices
    assert active_neurons(4864, 60, 80, 0.25) == 64 + 45 * 80
    assert active_neurons(1000, 0, 0, 0.333) == 667


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (0.99, "sparsity 0.99 leaves 0 of 8 experts active"),
        (0.01, "sparsity 0.01 leaves 8 of 8 experts active"),
    ],
)
def test_impossible_sparsity_is_refused(sparsity: float, message: str) -> None:
    with pytest.raises(WeaverError, match=message) as caught:
        active_neurons(1536, 8, 192, sparsity)
    assert "between 0.125 and 0.875" in caught.value.fix


def test_static_method_must_keep_and_drop_something() -> None:
    with pytest.raises(WeaverError, match="leaves 0 of 10 neurons"):
        active_neurons(10, 0, 0, 0.99)


def test_adaptive_allocation_by_hand() -> None:
    # z of the even layer: -1.34 -0.45 0.45 1.34; of the peaked one: three of -0.58, one of 1.73.
    # The best 4 of 8: 1.73, 1.34, 0.45, -0.45. Three from the even layer, one from the peaked one.
    scores = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 100.0, 0.0])]
    assert adaptive_active_neurons(scores, 0, 0, 0.5) == [3, 1]


def test_adaptive_allocation_is_rounded_to_slices() -> None:
    # As above with every neuron doubled: 6 and 2 of 8 neurons are 3 and 1 slices of 2.
    scores = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 100.0, 0.0])]
    doubled = [row.repeat_interleave(2) for row in scores]
    assert adaptive_active_neurons(doubled, 4, 2, 0.5) == [6, 2]
    # At 25% the best 12 hold all of the even layer, but one slice must stay routable: 3 + 3.
    assert adaptive_active_neurons(doubled, 4, 2, 0.25) == [6, 6]


@given(
    layers=st.integers(1, 6),
    slices=st.tuples(st.integers(2, 8), st.integers(1, 5), st.integers(0, 3)),
    sparsity=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_adaptive_allocation_meets_budget_and_bounds(
    layers: int, slices: tuple[int, int, int], sparsity: float, seed: int
) -> None:
    experts, width, leftover = slices
    size = experts * width + leftover
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(size, generator=generator).exp() * 10**e for e in range(layers)]
    try:
        active_neurons(size, experts, width, sparsity)
    except WeaverError:
        with pytest.raises(WeaverError, match="experts active"):
            adaptive_active_neurons(scores, experts, width, sparsity)
        return
    allocated = adaptive_active_neurons(scores, experts, width, sparsity)
    counts = [(active - leftover) / width for active in allocated]
    assert all(count == int(count) and 1 <= count <= experts - 1 for count in counts)
    ideal = layers * (size * (1 - sparsity) - leftover) / width
    clamped = min(max(ideal, layers), layers * (experts - 1))
    assert abs(sum(counts) - clamped) <= 0.5 + 1e-9


def test_adaptive_allocation_rejects_uneven_layers() -> None:
    with pytest.raises(ValueError, match="one common size"):
        adaptive_active_neurons([torch.ones(4), torch.ones(5)], 0, 0, 0.5)
    with pytest.raises(ValueError, match="one common size"):
        adaptive_active_neurons([], 0, 0, 0.5)
