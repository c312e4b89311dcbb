"""Single FFNs: bounds and errors by hand, synthetic cases, and times of a clock that stands still.

Where times matter, everything that is timed sleeps on a fake clock instead of computing quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weaver.artifacts.results import FfnLevel
from weaver.artifacts.types import ExpertLayout, Router
from weaver.evaluation import layers
from weaver.evaluation.layers import (
    COMPARED,
    FEW_TOKENS,
    LayerCase,
    measure_layer,
    relative_error,
    speed_bound,
    synthetic_case,
)
from weaver.kernels import timing
from weaver.kernels.backends import SMALL, cpu_backend
from weaver.kernels.reference import Routing, masked_forward, router_logits
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward

# 16 neurons: 4 shared, 3 experts of 4, of which one is selected.
SHAPE = LayerShape(4, 3, 4, 1, "linear")


def tiny_case(tokens: int = 8, dtype: torch.dtype = torch.float32) -> LayerCase:
    return synthetic_case(SHAPE, 8, tokens, dtype)


def one_each(*experts: int) -> Routing:
    """One token per expert that is named."""
    ids_TK = torch.tensor(experts)[:, None]
    return Routing.of_top_k(ids_TK, torch.ones(len(experts), 1), 3)


def test_the_bound_of_many_tokens_is_that_of_flops() -> None:
    dense, tokens = tiny_case().dense, FEW_TOKENS + 1
    # 3 * 16 rows against 3 * (4 + 4) and 3 of the router, whatever the union of the experts is.
    for ids in ([0] * tokens, [0, 1, 2, 0, 1]):
        assert speed_bound(dense, SHAPE, one_each(*ids)) == pytest.approx(48 / 27)
    # Ten pairs of five tokens: two experts each in the mean, 3 * (4 + 8) + 3.
    tokens_P = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    experts_P = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 1])
    uneven = Routing(tokens_P, experts_P, torch.ones(10), tokens, 3)
    assert speed_bound(dense, SHAPE, uneven) == pytest.approx(48 / 39)


@pytest.mark.parametrize(
    ("experts", "read"),
    [
        ((2,), 3 * (4 + 4) + 3),
        ((1, 1, 1, 1), 3 * (4 + 4) + 3),
        ((0, 2, 0, 2), 3 * (4 + 8) + 3),
        ((0, 1, 2, 0), 3 * (4 + 12) + 3),
    ],
)
def test_the_bound_of_few_tokens_is_that_of_the_union_of_their_experts(
    experts: tuple[int, ...], read: int
) -> None:
    assert speed_bound(tiny_case().dense, SHAPE, one_each(*experts)) == pytest.approx(48 / read)


def test_a_glu_router_has_two_rows_per_expert() -> None:
    shape = replace(SHAPE, router_kind="glu")
    assert speed_bound(tiny_case().dense, shape, one_each(0)) == pytest.approx(48 / 30)
    assert speed_bound(tiny_case().dense, shape, one_each(*[0] * 5)) == pytest.approx(48 / 30)


def test_relative_errors_by_hand() -> None:
    case = tiny_case(COMPARED + 1, torch.float64)
    routing = case.module.routing(case.x_TD)
    assert routing is not None
    y_TD = case.module(case.x_TD)
    assert relative_error(case, routing, y_TD) < 1e-14
    assert relative_error(case, routing, 1.5 * y_TD) == pytest.approx(0.5)
    assert relative_error(case, routing, -y_TD) == pytest.approx(2.0)
    assert relative_error(case, routing, torch.zeros_like(y_TD)) == pytest.approx(1.0)
    # Only the first tokens are compared.
    y_TD[COMPARED] = 1e9
    assert relative_error(case, routing, y_TD) < 1e-14
    y_TD[COMPARED - 1] = 1e9
    assert relative_error(case, routing, y_TD) > 1


def test_the_error_is_of_the_routing_as_it_is_with_constants_and_factors() -> None:
    case = tiny_case(5, torch.float64)
    case.module.expert_bias = torch.nn.Parameter(torch.ones(3, 8, dtype=torch.float64))
    weights, constants_ED = case.module.weights(), case.module.expert_bias
    # Not the experts that the router would choose, and a factor of 3.
    forced = Routing.of_top_k(torch.zeros(5, 1, dtype=torch.int64), 3 * torch.ones(5, 1), 3)
    y_TD = masked_forward(case.x_TD, weights, forced, 4, constants_ED)
    assert relative_error(case, forced, y_TD) < 1e-14
    without_TD = masked_forward(case.x_TD, weights, forced, 4)
    expected = 3 * 40**0.5 / float(y_TD.detach().norm())  # 5 * 8 values, each wrong by 3 * 1
    assert relative_error(case, forced, without_TD) == pytest.approx(expected)


def test_a_synthetic_case() -> None:
    shape = LayerShape(64, 8, 32, 2, "linear")
    case, skewed = (
        synthetic_case(shape, 64, 4096, torch.float32, skewed=skewed) for skewed in (False, True)
    )
    assert case.module.shape == shape
    assert skewed.module.shape == replace(shape, router_bias=True)
    assert case.dense.gate_FD.shape == (64 + 8 * 32, 64)
    assert case.weight_bytes == 3 * 320 * 64 * 4
    for each in (case, skewed):
        routing = each.module.routing(each.x_TD)
        assert routing is not None
        assert routing.top_k == 2
        assert routing.num_pairs == 2 * 4096
        for y_TD in (each.module(each.x_TD), each.variants["rows"](each.x_TD)):
            assert 0.5 < float(y_TD.std()) < 2
    # 2 of 8 experts: a quarter of the tokens each, or preferences that fall with the number.
    even_E, falling_E = (each.module.routing(each.x_TD).counts_E() / 4096 for each in (case, skewed))
    assert 0.2 < float(even_E.min()) < 0.25 < float(even_E.max()) < 0.3
    assert float(falling_E[0]) > 0.6
    assert float(falling_E[-1]) < 0.1
    assert bool((falling_E[:5].diff() < 0).all())


def test_the_scores_of_a_synthetic_router() -> None:
    even_TE, skewed_TE = (
        router_logits(case.x_TD, case.module.router.record(), "silu")
        for case in (
            synthetic_case(SHAPE, 256, 4096, torch.float32, skewed=skewed)
            for skewed in (False, True)
        )
    )
    assert float(even_TE.mean()) == pytest.approx(0, abs=0.1)
    assert float(even_TE.std()) == pytest.approx(1, abs=0.1)
    zipf_E = torch.tensor([1.0, 1 / 2, 1 / 3]).log()
    torch.testing.assert_close(skewed_TE, even_TE + zipf_E)


def test_the_seed_and_the_dtype_of_a_synthetic_case() -> None:
    first, again, other = (
        synthetic_case(SHAPE, 8, 4, torch.bfloat16, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.x_TD, again.x_TD)
    assert torch.equal(first.dense.down_FD, again.dense.down_FD)
    assert not torch.equal(first.x_TD, other.x_TD)
    assert not torch.equal(first.dense.down_FD, other.dense.down_FD)
    tensors = (first.x_TD, first.dense.gate_FD, first.module.up_weight, first.module.router.weight)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_a_copy_shares_nothing_with_what_was_already_used() -> None:
    case = tiny_case()
    routing = case.module.routing(case.x_TD)
    assert routing is not None
    functions: dict[str, Callable[[LayerCase], Tensor]] = {
        **{name: lambda of, n=name: of.variants[n](of.x_TD) for name in case.variants},
        "moe": lambda of: of.module(of.x_TD),
        "transformers": lambda of: of.transformers(of.x_TD, routing),
    }
    before = {name: function(case) for name, function in functions.items()}
    copy = case.copy()
    for name, function in functions.items():
        torch.testing.assert_close(function(copy), before[name])
    # Another copy of what has been used: had it the memory of the first, it would change with it.
    copy, kept = case.copy(), case.copy()
    for tensor in (copy.dense.gate_FD, copy.module.gate_weight):
        tensor.data.zero_()
    for name, function in functions.items():
        assert not function(copy).any(), name
        torch.testing.assert_close(function(case), before[name])
        torch.testing.assert_close(function(kept), before[name])


class Clock:
    """A clock that stands still unless something sleeps on it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def around(self, seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, taking so long."""

        def slow(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return function(*arguments, **named)

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Dense 3 and 2 ms, experts 0.5 ms, the module 1 ms, routing 0.25 ms, transformers 4 ms."""
    clock = Clock()
    variants = {"linear": clock.around(3e-3, Tensor.abs), "rows": clock.around(2e-3, Tensor.abs)}
    theirs = clock.around(4e-3, lambda x_TD, _routing: x_TD)
    monkeypatch.setattr(timing, "perf_counter", clock)
    monkeypatch.setattr(layers, "dense_variants", lambda _weights: variants)
    monkeypatch.setattr(layers, "transformers_forward", lambda *_: theirs)
    monkeypatch.setattr(layers, "moe_forward", clock.around(5e-4, layers.moe_forward))
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
    monkeypatch.setattr(LayerCase, "copy", lambda self: made.append(copy_of(self)) or made[-1])
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
@pytest.mark.parametrize(("hidden", "width"), [(8, 4), (256, 64)])
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
    zeros_E = torch.zeros(3)
    router = Router("linear", given.module.router.weight, zeros_E, zeros_E, None, zeros_E)
    case = LayerCase(given.dense, MoEFeedForward.convert(given.dense, layout, router), given.x_TD)
    row = measure_layer(case, 6, "layer", repeats=1, warmup=0)
    assert row.grouped_mm_ms is None
    assert row.relative_error is not None
    assert row.relative_error < 1e-6
