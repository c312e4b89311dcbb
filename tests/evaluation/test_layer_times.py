"""Times of single FFNs by a clock that stands still unless something sleeps on it."""

from __future__ import annotations

import pytest
import torch
from fake_clock import Clock
from torch import Tensor

from weaver.artifacts.bench_results import FfnLevel
from weaver.artifacts.types import ExpertLayout, Router
from weaver.evaluation import layers
from weaver.evaluation.layers import LayerCase, measure_layer, synthetic_case
from weaver.kernels import timing
from weaver.kernels.backends import SMALL, cpu_backend
from weaver.kernels.ops import moe_forward
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward


def tiny_case() -> LayerCase:
    """16 neurons: 4 shared, 3 experts of 4, of which one is selected; 8 tokens."""
    return synthetic_case(LayerShape(4, 3, 4, 1, "linear"), 8, 8, torch.float32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Dense 3 and 2 ms, experts 0.5 ms, the module 1 ms, routing 0.25 ms, transformers 4 ms."""
    clock = Clock()
    variants = {"linear": clock.around(3e-3, Tensor.abs), "rows": clock.around(2e-3, Tensor.abs)}
    theirs = clock.around(4e-3, lambda x_TD, _routing: x_TD)
    monkeypatch.setattr(timing, "perf_counter", clock)
    monkeypatch.setattr(layers, "dense_variants", lambda _weights: variants)
    monkeypatch.setattr(layers, "transformers_forward", lambda *_: theirs)
    monkeypatch.setattr(layers, "moe_forward", clock.around(5e-4, moe_forward))
    for name, seconds in (("forward", 1e-3), ("routing", 2.5e-4)):
        slow = clock.around(seconds, getattr(MoEFeedForward, name))
        # A plain function, so that it is a method of the class.
        monkeypatch.setattr(MoEFeedForward, name, lambda *arguments, f=slow: f(*arguments))
    return clock


@pytest.mark.parametrize(
    ("level", "moe_ms", "grouped_mm_ms"), [("kernel", 0.5, 4.0), ("layer", 1.0, 4.25)]
)
@pytest.mark.parametrize(("copies", "stack"), [(1, 0.1), (1, 1.0), (4, 3.5)])
def test_times_are_of_one_copy(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    level: FfnLevel,
    moe_ms: float,
    grouped_mm_ms: float,
    copies: int,
    stack: float,
) -> None:
    case = tiny_case()
    monkeypatch.setattr(layers, "STACK_BYTES", int(stack * case.weight_bytes))
    made: list[LayerCase] = []
    copy_of = LayerCase.copy

    def counted(case: LayerCase) -> LayerCase:
        made.append(copy_of(case))
        return made[-1]

    monkeypatch.setattr(LayerCase, "copy", counted)
    row = measure_layer(case, 6, level, repeats=2, warmup=1)
    assert len(made) == copies - 1
    assert (row.tokens, row.phase, row.dense_variant) == (6, "prefill", "rows")
    assert (row.dense_ms, row.moe_ms) == pytest.approx((2.0, moe_ms))
    assert row.grouped_mm_ms == pytest.approx(grouped_mm_ms)
    assert row.routing_ms == pytest.approx(0.25)
    assert row.bound == pytest.approx(48 / 27)
    assert row.speedup == pytest.approx(2 / moe_ms)
    assert row.path == "torch masked"


def test_what_computes_wrongly_has_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "STACK_BYTES", 1)
    right = measure_layer(tiny_case(), 6, "layer", repeats=1, warmup=0)
    assert right.relative_error is not None
    assert 0 < right.relative_error < 1e-6
    correct = MoEFeedForward.forward
    monkeypatch.setattr(MoEFeedForward, "forward", lambda self, x_TD: 1.25 * correct(self, x_TD))
    wrong = measure_layer(tiny_case(), 6, "layer", repeats=1, warmup=0)
    assert wrong.relative_error == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "width"), [(8, 8), (256, 64)])
def test_every_column_is_filled(
    monkeypatch: pytest.MonkeyPatch, hidden: int, width: int, dtype: torch.dtype, tokens: int
) -> None:
    monkeypatch.setattr(layers, "STACK_BYTES", 1)
    shape = LayerShape(2 * width, 6, width, 2, "linear")
    case = synthetic_case(shape, hidden, 70, dtype)
    assert (case.dense.gate_FD.numel() >= SMALL) == (hidden == 256)
    row = measure_layer(case, tokens, "layer", repeats=2, warmup=1)
    assert (row.tokens, row.phase) == (tokens, "decode" if tokens == 1 else "prefill")
    # The index in a model is not known here.
    empty = [name for name, value in row.model_dump().items() if value is None]
    assert empty == ["layer"]
    assert row.dense_variant in case.variants
    assert row.path is not None
    assert row.path.split()[0] == cpu_backend(case.dense.gate_FD.numel(), dtype)
    assert row.relative_error is not None
    assert 0 < row.relative_error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_threshold_has_no_counterpart_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "STACK_BYTES", 1)
    given = tiny_case()
    layout = ExpertLayout(
        intermediate_size=16,
        top_k=1,
        shared_S=torch.arange(4),
        experts_EN=torch.arange(4, 16).view(3, 4),
        selection="threshold",
    )
    zeros_E, weight_ED = torch.zeros(3), torch.randn(3, 8)
    router = Router("linear", weight_ED, zeros_E, zeros_E, None, zeros_E)
    case = LayerCase(given.dense, MoEFeedForward.convert(given.dense, layout, router), given.x_TD)
    row = measure_layer(case, 6, "layer", repeats=1, warmup=0)
    assert row.grouped_mm_ms is None
    assert row.relative_error is not None
    assert row.relative_error < 1e-6


@pytest.mark.parametrize(
    ("hidden", "width", "dtype", "timed"),
    [
        (8, 8, torch.bfloat16, True),  # rows of 16 bytes
        (8, 4, torch.bfloat16, False),  # of the down projection 8
        (12, 8, torch.bfloat16, False),  # of gate and up projection 24
        (12, 4, torch.float32, True),  # 48 and 16
    ],
)
def test_rows_that_grouped_mm_does_not_take_are_left_out(
    monkeypatch: pytest.MonkeyPatch, hidden: int, width: int, dtype: torch.dtype, timed: bool
) -> None:
    monkeypatch.setattr(layers, "STACK_BYTES", 1)
    case = synthetic_case(LayerShape(4, 3, width, 1, "linear"), hidden, 6, dtype)
    row = measure_layer(case, 6, "kernel", repeats=1, warmup=0)
    assert (row.grouped_mm_ms is not None) == timed
