"""Predicted speed-ups by hand, from made-up costs."""

from __future__ import annotations

import pytest
import torch

from weaver.kernels.costs import Costs, LayerKind
from weaver.models import forecast
from weaver.models.accounting import LayerShape
from weaver.models.forecast import predicted_seconds, predicted_speedup

COSTS = Costs(
    dense=(2.0, 2.0, 2.0, 8.0, 32.0),
    masked=(2.0, 2.0, 4.0, 10.0, 40.0),
    expert=(0.5, 0.5, 1.0, 2.0, 8.0),
    routing=(0.1, 0.1, 0.1, 0.1, 0.1),
)
ROUTED = LayerShape(10, 4, 10, 1, "linear")
STATIC = LayerShape(25)


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[LayerKind]:
    asked: list[LayerKind] = []

    def costs_of(kind: LayerKind) -> Costs:
        asked.append(kind)
        return COSTS

    monkeypatch.setattr(forecast, "costs_of", costs_of)
    return asked


def seconds(shape: LayerShape, tokens: int) -> tuple[float, float]:
    return predicted_seconds(shape, 8, 50, torch.float32, tokens)


def test_seconds_of_a_layer(kinds: list[LayerKind]) -> None:
    # One token: shared 2 * 10 / 50, one expert 0.5, the router 0.1.
    assert seconds(ROUTED, 1) == pytest.approx((2.0, 1.0))
    # 16 tokens: shared 4 * 10 / 50, 4 experts with 4 tokens each at 0.5.
    assert seconds(ROUTED, 16) == pytest.approx((2.0, 2.9))
    # Half of the neurons, nothing to route.
    assert seconds(STATIC, 16) == pytest.approx((2.0, 2.0))
    threads = torch.get_num_threads()
    routed = LayerKind(8, 50, 10, torch.float32, "cpu", "torch", threads)
    static = LayerKind(8, 50, 50, torch.float32, "cpu", "torch", threads)
    assert kinds == [routed, routed, static]


def test_speedup_of_several_layers() -> None:
    found = predicted_speedup([ROUTED, STATIC], 8, 50, torch.float32, 16)
    assert found == pytest.approx(4.0 / 4.9)


def test_experts_that_overlap_are_timed_as_they_are_stored(kinds: list[LayerKind]) -> None:
    """The dense layer has 50 neurons, the converted one 6 * 20."""
    shape = LayerShape(0, 6, 20, 1, "linear", weighting="softmax")
    assert seconds(shape, 1) == pytest.approx((2.0, 0.6))
    assert [(kind.neurons, kind.width) for kind in kinds] == [
        (50, 20),
        (120, 20),
    ]
