"""The choice between the paths, and that the chosen one is taken."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.types import Router
from weaver.kernels import backends, ops
from weaver.kernels.backends import Backend, Forwards, backend_for, cpu_backend, triton_forward
from weaver.kernels.costs import Family, Workload
from weaver.kernels.cpu import build
from weaver.kernels.ops import choose_path, moe_forward, route_tokens
from weaver.kernels.reference import Routing, masked_forward, route

LARGE = torch.empty(512, 256, device="meta")  # exactly SMALL weights


def first_experts(tokens: int, top_k: int, experts: int) -> Routing:
    """Every token takes the first K experts."""
    ids_TK = torch.arange(top_k).expand(tokens, top_k)
    return Routing.of_top_k(ids_TK, torch.ones(tokens, top_k), experts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Family]:
    """Families whose costs were asked for; grouping pays where a token has one expert."""
    families: list[Family] = []

    def costs_of(family: Family) -> Any:
        families.append(family)
        return FakeCosts()

    class FakeCosts:
        def faster(self, work: Workload, _family: Family) -> str:
            return "grouped" if work.num_pairs == work.num_tokens else "masked"

    monkeypatch.setattr(ops, "costs_of", costs_of)
    ops._path.cache_clear()
    monkeypatch.setattr(ops, "_said", set())
    return families


def test_the_costs_of_the_layers_family_decide(asked: list[Family]) -> None:
    weights = GluWeights(LARGE, LARGE, LARGE, "silu")
    assert choose_path(weights, first_experts(10, 1, 4), 112, "native") == "grouped"
    assert choose_path(weights, first_experts(10, 2, 4), 112, "native") == "masked"
    threads = torch.get_num_threads()
    expected = Family(256, 512, 100, torch.float32, "meta", "native", threads)
    assert asked == [expected, expected]
    # An answer is looked up the second time.
    choose_path(weights, first_experts(10, 2, 4), 112, "native")
    assert len(asked) == 2


def test_a_layer_too_small_to_gain_is_masked_unmeasured(asked: list[Family]) -> None:
    matrix_FD = torch.empty(511, 256, device="meta")
    weights = GluWeights(matrix_FD, matrix_FD, matrix_FD, "silu")
    assert choose_path(weights, first_experts(10, 1, 5), 1, "torch") == "masked"
    assert asked == []


def test_that_nothing_is_skipped_is_said_once(
    asked: list[Family], caplog: pytest.LogCaptureFixture
) -> None:
    weights = GluWeights(LARGE, LARGE, LARGE, "silu")
    with caplog.at_level(logging.WARNING):
        choose_path(weights, first_experts(10, 1, 4), 112, "native")
        # All experts are chosen: nothing could have been skipped.
        choose_path(weights, first_experts(10, 4, 4), 112, "native")
        assert caplog.records == []
        for tokens in (10, 20):
            choose_path(weights, first_experts(tokens, 2, 4), 112, "native")
    (record,) = caplog.records
    assert record.getMessage().startswith("Experts of 100 x 256 in float32: at 10 tokens")


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_chosen_path_is_taken(
    make_ffn: Any, make_routing: Any, monkeypatch: pytest.MonkeyPatch, path: Any, backend: Backend
) -> None:
    if backend == "native" and not build.is_available():
        pytest.skip("needs a C++ compiler")
    x_TD = torch.randn(33, 16, generator=torch.Generator().manual_seed(1))
    weights, routing = make_ffn(16, 34, dtype=torch.float32), make_routing(33, 4, 2)
    bias_ED = torch.ones(4, 16)
    expected_TD = masked_forward(x_TD, weights, routing, 10, bias_ED)
    forwards = backends.forwards(backend)
    other = {"masked": "grouped", "grouped": "masked"}[path]
    fail = {other: lambda *_: pytest.fail(f"{other} was called")}
    only: Forwards = replace(forwards, **fail)
    monkeypatch.setattr(ops, "backend_for", lambda *_: backend)
    monkeypatch.setattr(ops, "forwards", lambda asked: {backend: only}[asked])
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    y_TD = moe_forward(x_TD, weights, routing, 10, bias_ED)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)


def test_a_static_layer_has_nothing_to_choose(
    make_ffn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: pytest.fail("was asked"))
    weights = make_ffn(256, 600, dtype=torch.float32, biases=True)
    x_TD = torch.randn(3, 256)
    expected_TD = masked_forward(x_TD, weights, None, 600)
    torch.testing.assert_close(
        moe_forward(x_TD, weights, None, 600), expected_TD, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [16, 600])
def test_tokens_are_routed_by_what_computes_the_ffn(make_ffn: Any, size: int) -> None:
    weights = make_ffn(size, 2 * size, dtype=torch.float32)
    router = Router("linear", torch.randn(5, size), torch.ones(5), torch.zeros(5))
    x_TD = torch.randn(9, size)
    found, expected = route_tokens(x_TD, weights, router, 2), route(x_TD, router, "silu", 2)
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
    assert backend_for(x_TD, weights, bias_ED, None) == native
    assert backend_for(x_TD, make_ffn(256, 511, dtype=torch.float32)) == "torch"
    assert backend_for(x_TD.double(), weights.to(torch.float64)) == "torch"
    assert backend_for(x_TD.bfloat16(), weights) == "torch"
    assert cpu_backend(512 * 256, torch.float16) == native
    # What has gradients is computed by what can be differentiated.
    bias_ED.requires_grad_()
    assert backend_for(x_TD, weights, bias_ED) == "torch"
    assert backend_for(x_TD, replace(weights, up_FD=weights.up_FD.requires_grad_())) == "torch"
    with torch.no_grad():
        assert backend_for(x_TD, weights, bias_ED) == native


@pytest.mark.parametrize("uneven", [False, True])
def test_the_triton_path_adds_the_shared_expert(
    make_ffn: Any, make_routing: Any, uneven: bool
) -> None:
    pytest.importorskip("triton")
    x_TD: Tensor = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    weights = make_ffn(16, 34, dtype=torch.float32, biases=True)
    routing, bias_ED = make_routing(5, 4, 2, uneven=uneven), torch.ones(4, 16)
    y_TD = triton_forward(x_TD, weights, routing, 10, bias_ED)
    expected_TD = masked_forward(x_TD, weights, routing, 10, bias_ED)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-5)
