"""The choice between the paths, and that the chosen one is taken."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_kernel import require_native
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.types import Router, RouterKind, Selection, Weighting
from weaver.kernels import backends, ops
from weaver.kernels.backends import (
    Backend,
    Forwards,
    backend_for,
    cpu_backend,
    triton_forward,
    triton_slots,
)
from weaver.kernels.costs import LayerKind, Workload
from weaver.kernels.cpu import build
from weaver.kernels.cpu import op as native
from weaver.kernels.ops import (
    DECODED,
    choose_path,
    layer_forward,
    moe_forward,
    route_tokens,
)
from weaver.kernels.reference import ExpertChoice, MoELayer, Routing, masked_forward, route

LARGE_FD = torch.empty(512, 256, device="meta")  # exactly SMALL weights
LARGE = MoELayer(GluWeights(LARGE_FD, LARGE_FD, LARGE_FD, "silu"), 112)


def first_experts(tokens: int, top_k: int, experts: int) -> Routing:
    """Every token takes the first K experts."""
    ids_TK = torch.arange(top_k).expand(tokens, top_k)
    return Routing.of_top_k(ids_TK, torch.ones(tokens, top_k), experts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LayerKind]]:
    """Families whose costs were asked for; grouping pays where a token has one expert."""
    kinds: list[LayerKind] = []

    def costs_of(kind: LayerKind) -> Any:
        kinds.append(kind)
        return FakeCosts()

    class FakeCosts:
        def faster(self, work: Workload, _family: LayerKind) -> str:
            return "grouped" if work.num_pairs == work.num_tokens else "masked"

    monkeypatch.setattr(ops, "costs_of", costs_of)
    ops._faster_path.cache_clear()
    monkeypatch.setattr(ops, "_warned", set())
    yield kinds
    # What was answered here must not be looked up by other tests.
    ops._faster_path.cache_clear()


def test_the_costs_of_the_layers_family_decide(asked: list[LayerKind]) -> None:
    assert choose_path(LARGE, first_experts(10, 1, 4), "native") == "grouped"
    assert choose_path(LARGE, first_experts(10, 2, 4), "native") == "masked"
    threads = torch.get_num_threads()
    expected = LayerKind(256, 512, 100, torch.float32, "meta", "native", threads)
    assert asked == [expected, expected]
    # An answer is looked up the second time.
    choose_path(LARGE, first_experts(10, 2, 4), "native")
    assert len(asked) == 2


def test_a_layer_too_small_to_gain_is_masked_unmeasured(asked: list[LayerKind]) -> None:
    matrix_FD = torch.empty(511, 256, device="meta")
    layer = MoELayer(GluWeights(matrix_FD, matrix_FD, matrix_FD, "silu"), 1)
    assert choose_path(layer, first_experts(10, 1, 5), "torch") == "masked"
    assert asked == []


def test_that_nothing_is_skipped_is_said_once(
    asked: list[LayerKind], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        choose_path(LARGE, first_experts(10, 1, 4), "native")
        # All experts are chosen: nothing could have been skipped.
        choose_path(LARGE, first_experts(10, 4, 4), "native")
        assert caplog.records == []
        for tokens in (10, 20):
            choose_path(LARGE, first_experts(tokens, 2, 4), "native")
    (record,) = caplog.records
    assert record.getMessage().startswith("Experts of 100 x 256 in float32: at 10 tokens")


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_chosen_path_is_taken(
    make_ffn: Any, make_routing: Any, monkeypatch: pytest.MonkeyPatch, path: Any, backend: Backend
) -> None:
    if backend == "native":
        require_native()
    x_TD = torch.randn(33, 16, generator=torch.Generator().manual_seed(1))
    layer = MoELayer(make_ffn(16, 34, dtype=torch.float32), 10, torch.ones(4, 16))
    routing = make_routing(33, 4, 2)
    expected_TD = masked_forward(x_TD, layer, routing)
    forwards = backends.forwards(backend)
    other = {"masked": "grouped", "grouped": "masked"}[path]
    fail = {other: lambda *_: pytest.fail(f"{other} was called")}
    only: Forwards = replace(forwards, **fail)
    monkeypatch.setattr(ops, "backend_for", lambda *_: backend)
    monkeypatch.setattr(ops, "forwards", lambda asked: {backend: only}[asked])
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    y_TD = moe_forward(x_TD, layer, routing)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)


def test_a_static_layer_has_nothing_to_choose(
    make_ffn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: pytest.fail("was asked"))
    layer = MoELayer(make_ffn(256, 600, dtype=torch.float32, biases=True), 600)
    x_TD = torch.randn(3, 256)
    y_TD, expected_TD = moe_forward(x_TD, layer, None), masked_forward(x_TD, layer, None)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [16, 600])
def test_tokens_are_routed_by_what_computes_the_ffn(make_ffn: Any, size: int) -> None:
    weights = make_ffn(size, 2 * size, dtype=torch.float32)
    router = Router("linear", torch.randn(5, size), torch.ones(5), torch.zeros(5))
    x_TD = torch.randn(9, size)
    found, expected = (
        route_tokens(x_TD, MoELayer(weights, 0, router=router), ExpertChoice(2)),
        route(x_TD, router, "silu", ExpertChoice(2)),
    )
    assert torch.equal(found.experts_P, expected.experts_P)
    torch.testing.assert_close(found.weights_P, expected.weights_P)


@pytest.mark.parametrize("available", [False, True])
def test_who_computes_on_a_cpu(
    make_ffn: Any, monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    monkeypatch.setattr(build, "is_available", lambda: available)
    native = "native" if available else "torch"
    weights = make_ffn(256, 512, dtype=torch.float32)
    x_TD, bias_ED = torch.zeros(1, 256), torch.zeros(4, 256)
    layer = MoELayer(weights, 0, bias_ED, router_for(256))
    assert backend_for(x_TD, layer) == native
    assert backend_for(x_TD, MoELayer(make_ffn(256, 511, dtype=torch.float32), 0)) == "torch"
    assert backend_for(x_TD.double(), layer.to(torch.float64)) == "torch"
    assert backend_for(x_TD.bfloat16(), layer) == "torch"
    assert cpu_backend(512 * 256, torch.float16) == native
    # What has gradients is computed by what can be differentiated.
    assert layer.router is not None
    for tensor in (x_TD, weights.up_FD, bias_ED, layer.router.scale_E, layer.router.bias_E):
        assert tensor is not None
        tensor.requires_grad_()
        assert backend_for(x_TD, layer) == "torch"
        with torch.no_grad():
            assert backend_for(x_TD, layer) == native
        tensor.requires_grad_(False)
    assert backend_for(x_TD, layer, torch.ones(3, requires_grad=True)) == "torch"


@pytest.mark.parametrize("uneven", [False, True])
def test_the_triton_path_adds_the_shared_expert(
    make_ffn: Any, make_routing: Any, uneven: bool
) -> None:
    pytest.importorskip("triton")
    x_TD: Tensor = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    weights = make_ffn(16, 34, dtype=torch.float32, biases=True)
    layer, routing = MoELayer(weights, 10, torch.ones(4, 16)), make_routing(5, 4, 2, uneven=uneven)
    y_TD = triton_forward(x_TD, layer, routing)
    expected_TD = masked_forward(x_TD, layer, routing)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)


def router_for(hidden: int, kind: RouterKind = "linear", weighting: Weighting = "unit") -> Router:
    """Of four experts, with everything that it can have."""
    generator = torch.Generator().manual_seed(2)
    weight_ED, up_ED = (torch.randn(4, hidden, generator=generator) for _ in range(2))
    return Router(
        kind=kind,
        weight_ED=weight_ED / hidden**0.5,
        scale_E=torch.rand(4, generator=generator),
        balance_bias_E=0.1 * torch.randn(4, generator=generator),
        up_weight_ED=up_ED if kind == "glu" else None,
        bias_E=torch.randn(4, generator=generator) if kind == "linear" else None,
        weighting=weighting,
        routed_scaling=1.0 if weighting == "unit" else 1.5,
    )


def inputs(tokens: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Inputs, and constants of the experts."""
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(tokens, hidden, generator=generator)
    return x_TD, torch.randn(4, hidden, generator=generator)


ROUTED = [
    ("linear", "top-k", "unit"),
    ("glu", "top-k", "unit"),
    ("linear", "threshold", "unit"),
    ("linear", "top-k", "softmax"),
]


@pytest.mark.parametrize(("kind", "selection", "weighting"), ROUTED)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("neurons", [512, 48])
def test_a_layer_is_its_routing_and_its_experts(
    make_ffn: Any,
    asked: list[LayerKind],
    kind: RouterKind,
    selection: Selection,
    weighting: Weighting,
    tokens: int,
    top_k: int,
    neurons: int,
) -> None:
    weights = make_ffn(256, neurons, dtype=torch.float32, biases=True)
    router, (x_TD, bias_ED) = router_for(256, kind, weighting), inputs(tokens, 256)
    layer = MoELayer(weights, neurons // 4, bias_ED, router)
    y_TD, counts_T = layer_forward(x_TD, layer, ExpertChoice(top_k, selection))
    routing = route(x_TD, router, weights.activation, ExpertChoice(top_k, selection))
    assert 0 < routing.num_pairs < 4 * tokens
    expected_TD = masked_forward(x_TD, layer, routing)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-5)
    assert counts_T.tolist() == routing.counts_T().tolist()
    # A tiny layer, and decoding where the kernel can be compiled, need no costs.
    needless = neurons == 48 or (tokens <= DECODED and build.is_available())
    assert (asked == []) == needless


@pytest.mark.parametrize(
    ("tokens", "neurons", "taken"),
    [(1, 512, 1), (DECODED, 512, 1), (DECODED + 1, 512, 0), (1, 48, 0)],
)
def test_a_few_tokens_are_decoded_in_one_call(
    make_ffn: Any,
    asked: list[LayerKind],
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    neurons: int,
    taken: int,
) -> None:
    require_native()
    weights, router = make_ffn(256, neurons, dtype=torch.float32), router_for(256)
    x_TD, bias_ED = inputs(tokens, 256)
    calls: list[tuple[Any, ...]] = []
    decode = native.decode

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments[1:])
        return decode(*arguments)

    monkeypatch.setattr(native, "decode", counted)
    choice = ExpertChoice(2, "threshold")
    layer = MoELayer(weights, neurons // 4, bias_ED, router)
    y_TD, _ = layer_forward(x_TD, layer, choice)
    assert calls == [(layer, choice)] * taken
    # What has gradients is computed by what can be differentiated.
    for tensor in (x_TD, router.weight_ED, router.scale_E, bias_ED):
        tensor.requires_grad_()
        found_TD, _ = layer_forward(x_TD, layer, choice)
        assert found_TD.requires_grad
        assert len(calls) == taken
        torch.testing.assert_close(found_TD, y_TD, rtol=1e-4, atol=1e-5)
        tensor.requires_grad_(False)


@pytest.mark.parametrize(("kind", "selection", "weighting"), ROUTED)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("tokens", [3, 9])
def test_on_a_gpu_slots_go_to_the_kernels(
    make_ffn: Any,
    asked: list[LayerKind],
    monkeypatch: pytest.MonkeyPatch,
    kind: RouterKind,
    selection: Selection,
    weighting: Weighting,
    top_k: int,
    tokens: int,
) -> None:
    """Grouping pays for one expert per token, of a threshold for the mean that it is set to."""
    pytest.importorskip("triton")
    weights = make_ffn(16, 34, dtype=torch.float32, biases=True)
    router, (x_TD, bias_ED) = router_for(16, kind, weighting), inputs(tokens, 16)
    routing = route(x_TD, router, weights.activation, ExpertChoice(top_k, selection))
    layer = MoELayer(weights, 10, bias_ED, router)
    expected_TD = masked_forward(x_TD, layer, routing)
    monkeypatch.setattr(ops, "backend_for", lambda *_: "triton")
    shapes: list[tuple[int, ...]] = []

    def counted(*arguments: Any) -> Tensor:
        shapes.append(tuple(arguments[2].shape))
        return triton_slots(*arguments)

    monkeypatch.setattr(ops, "triton_slots", counted)
    if top_k == 1:
        # A list of pairs has as many as the values say: it would wait for the GPU.
        monkeypatch.setattr(ops, "forwards", lambda *_: pytest.fail("pairs were counted"))
    y_TD, counts_T = layer_forward(x_TD, layer, ExpertChoice(top_k, selection))
    assert counts_T.tolist() == routing.counts_T().tolist()
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)
    slots = 1 if selection == "top-k" else 4
    assert shapes == ([(tokens, slots)] if top_k == 1 else [])
    assert asked[0] == LayerKind(16, 34, 6, torch.float32, "cpu", "triton", torch.get_num_threads())
