"""The C++ kernel against the definition in float64: every loop that it has, at every edge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from native_kernel import require_native
from torch import Tensor

from weaver.algorithms.glu import ACTIVATIONS, GluWeights
from weaver.artifacts.types import Router
from weaver.kernels import reference
from weaver.kernels.cpu import op
from weaver.kernels.machine import cpu_features
from weaver.kernels.reference import ExpertChoice, MoELayer, Routing, masked_forward

# Relative error of the whole output.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}

# T, D, S, E, N, K and what is special about the routing. Up to 12 tokens of an expert (float32: 32
# where D makes no tiles) are streamed; D = 64 is a whole number of tiles, 40 and 13 are not.
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any]]] = {
    "one token": (1, 64, 10, 4, 6, 2, {}),
    "two tokens": (2, 64, 10, 4, 6, 2, {}),
    "three tokens": (3, 64, 11, 5, 9, 3, {}),
    "seven tokens": (7, 64, 11, 5, 9, 3, {}),
    "seventeen tokens": (17, 64, 33, 3, 16, 2, {}),
    "several chunks of tiles": (600, 64, 48, 3, 40, 2, {}),
    "one odd block": (37, 64, 40, 4, 24, 2, {}),
    "odd sizes": (37, 13, 11, 5, 9, 3, {}),
    "no tiles": (300, 40, 33, 3, 17, 2, {}),
    "an empty expert": (33, 64, 10, 4, 6, 2, {"never": 0}),
    "one hot expert": (133, 64, 10, 4, 6, 1, {"hot": 2}),
    "all experts": (33, 64, 10, 4, 6, 4, {}),
    "one expert": (33, 64, 10, 1, 6, 1, {}),
    "no token": (0, 64, 10, 4, 6, 2, {}),
    "nothing shared": (33, 64, 0, 4, 6, 2, {}),
    "uneven": (137, 64, 11, 5, 9, 3, {"uneven": True}),
    "no pair": (33, 64, 10, 4, 6, 2, {"nothing": True}),
    "nothing shared, no pair": (33, 64, 0, 4, 6, 2, {"nothing": True}),
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    require_native()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def problem(
    make_ffn: Any, make_routing: Any, case: str, dtype: torch.dtype, *, biases: bool
) -> tuple[Tensor, MoELayer, Routing]:
    tokens, hidden, shared, experts, width, top_k, special = SHAPES[case]
    weights = make_ffn(hidden, shared + experts * width, dtype=dtype, biases=biases)
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
    bias_ED = torch.randn(experts, hidden, generator=generator).to(dtype) if biases else None
    layer = MoELayer(weights, shared, bias_ED)
    return x_TD, layer, make_routing(tokens, experts, top_k, **special)


def truth(x_TD: Tensor, layer: MoELayer, routing: Routing | None) -> Tensor:
    return masked_forward(x_TD.double(), layer.to(torch.float64), routing)


def assert_near(y_TD: Tensor, expected_TD: Tensor, limit: float) -> None:
    assert y_TD.shape == expected_TD.shape
    error = (y_TD.double() - expected_TD).norm()
    assert error <= limit * expected_TD.norm(), float(error / expected_TD.norm())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", SHAPES)
def test_the_same_outputs(
    make_ffn: Any, make_routing: Any, threads: int, case: str, dtype: torch.dtype, biases: bool
) -> None:
    arguments = problem(make_ffn, make_routing, case, dtype, biases=biases)
    expected_TD = truth(*arguments)
    if len(expected_TD) > 3 and (arguments[1].num_shared or arguments[2].num_pairs):
        assert 0.3 < expected_TD.std() < 5  # Else a relative error says nothing.
    for forward in (op.moe, op.masked):
        y_TD = forward(*arguments)
        assert y_TD.dtype == dtype
        assert_near(y_TD, expected_TD, LIMITS[dtype])
        assert torch.equal(forward(*arguments), y_TD)


# Paths of products, by the instructions without which they cannot run.
PATHS = {"amx": "amx_bf16", "dot": "avx512_bf16", "floats": None, "gemm": None}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """A way to compute products, instead of the best that this processor has."""
    needed = PATHS[request.param]
    if needed and needed not in cpu_features().split():
        pytest.skip(f"this processor has no {needed}, without which the path cannot run")
    before = torch.ops.weaver_cpu.use_path(request.param)
    yield request.param
    torch.ops.weaver_cpu.use_path(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [case for case in SHAPES if SHAPES[case][0] > 12])
def test_every_path_gives_the_same_outputs(
    make_ffn: Any, make_routing: Any, path: str, threads: int, case: str, dtype: torch.dtype
) -> None:
    arguments = problem(make_ffn, make_routing, case, dtype, biases=True)
    for forward in (op.moe, op.masked):
        y_TD = forward(*arguments)
        assert_near(y_TD, truth(*arguments), LIMITS[dtype])
        assert torch.equal(forward(*arguments), y_TD)


def test_a_path_that_no_processor_has() -> None:
    with pytest.raises(RuntimeError, match="this processor has no path sse for products"):
        torch.ops.weaver_cpu.use_path("sse")


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(make_ffn: Any, make_routing: Any, activation: str, tokens: int) -> None:
    weights = make_ffn(64, 40, dtype=torch.float32, activation=activation)
    # Gates far out on both sides, where an exponential overflows.
    weights = replace(weights, gate_FD=weights.gate_FD * torch.linspace(0.1, 60, 40)[:, None])
    layer = MoELayer(weights, 8)
    x_TD = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    routing = make_routing(tokens, 4, 2)
    assert_near(op.moe(x_TD, layer, routing), truth(x_TD, layer, routing), 1e-6)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_dense_ffn(make_ffn: Any, dtype: torch.dtype, tokens: int) -> None:
    layer = MoELayer(make_ffn(64, 50, dtype=dtype, biases=True), 50)
    x_TD = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_near(op.masked(x_TD, layer, None), truth(x_TD, layer, None), LIMITS[dtype])


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", LIMITS)
def test_rows_that_lie_apart(
    make_ffn: Any, make_routing: Any, dtype: torch.dtype, tokens: int
) -> None:
    whole = make_ffn(128, 40, dtype=dtype)
    weights = GluWeights(whole.gate_FD[:, :64], whole.up_FD[:, 64:], whole.down_FD[:, :64], "silu")
    layer = MoELayer(weights, 8)
    x_TD = torch.randn(64, tokens, generator=torch.Generator().manual_seed(1)).to(dtype).t()
    routing = make_routing(tokens, 4, 2)
    assert_near(op.moe(x_TD, layer, routing), truth(x_TD, layer, routing), LIMITS[dtype])


def make_router(experts: int, hidden: int, dtype: torch.dtype, *, glu: bool, bias: bool) -> Router:
    generator = torch.Generator().manual_seed(experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return Router(
        kind="glu" if glu else "linear",
        weight_ED=normal(experts, hidden),
        scale_E=normal(experts),
        balance_bias_E=0.1 * normal(experts),
        up_weight_ED=normal(experts, hidden) if glu else None,
        bias_E=normal(experts) if bias else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("glu", "bias", "selection", "weighting"),
    [
        (False, False, "top-k", "unit"),
        (False, True, "threshold", "unit"),
        (True, False, "top-k", "unit"),
        (False, True, "top-k", "softmax"),
    ],
)
@pytest.mark.parametrize(("tokens", "experts"), [(0, 5), (1, 5), (33, 7), (33, 40)])
def test_the_same_routing(
    tokens: int,
    experts: int,
    glu: bool,
    bias: bool,
    selection: Any,
    weighting: Any,
    dtype: torch.dtype,
) -> None:
    router = make_router(experts, 24, dtype, glu=glu, bias=bias)
    if weighting == "softmax":
        router = replace(router, weighting=weighting, routed_scaling=1.5)
    x_TD = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = op.route(x_TD, router, "silu", ExpertChoice(3, selection))
    expected = reference.route(x_TD, router, "silu", ExpertChoice(3, selection))
    assert torch.equal(found.selected_TE(), expected.selected_TE())
    torch.testing.assert_close(found.factors_TE(), expected.factors_TE(), rtol=1e-4, atol=1e-5)
    assert found.top_k == expected.top_k == (3 if selection == "top-k" else None)
    if selection == "top-k":
        assert torch.equal(found.experts_P, expected.experts_P)
    assert torch.equal(found.tokens_P, expected.tokens_P)


@pytest.mark.parametrize("tokens", [1, 4, 33])
def test_every_token_may_have_a_threshold_of_its_own(tokens: int) -> None:
    router = make_router(7, 24, torch.float32, glu=False, bias=True)
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(tokens, 24, generator=generator)
    lowest_T = torch.randn(tokens, generator=generator)
    lowest_T[0] = -torch.inf
    found = op.route(x_TD, router, "silu", ExpertChoice(3, "threshold", lowest_T))
    expected = reference.route(x_TD, router, "silu", ExpertChoice(3, "threshold", lowest_T))
    assert torch.equal(found.selected_TE(), expected.selected_TE())
    assert found.counts_T()[0] == 7
    scores_TE = reference.router_logits(x_TD, router, "silu") + router.balance_bias_E
    assert torch.equal(expected.selected_TE(), scores_TE > lowest_T[:, None])


def test_softmax_weights_in_the_kernel() -> None:
    """One expert has exactly c, also where only its bias makes it the chosen one."""
    router = make_router(5, 24, torch.float32, glu=False, bias=True)
    router = replace(router, weighting="softmax", routed_scaling=0.7)
    x_TD = 100 * torch.randn(33, 24, generator=torch.Generator().manual_seed(3))
    forced = replace(router, balance_bias_E=torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0]))
    for each in (router, forced):
        found = op.route(x_TD, each, "silu", ExpertChoice(1))
        assert torch.equal(
            found.experts_P, reference.route(x_TD, each, "silu", ExpertChoice(1)).experts_P
        )
        assert bool((found.weights_P == 0.7).all())
    with pytest.raises(ValueError, match="softmax weights need selection by top-k"):
        op.route(x_TD, router, "silu", ExpertChoice(1, "threshold"))


def test_a_router_of_another_dtype() -> None:
    router = make_router(5, 24, torch.float32, glu=False, bias=True)
    x_TD = torch.randn(6, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = op.route(x_TD, router, "silu", ExpertChoice(2))
    assert torch.equal(
        found.experts_P, reference.route(x_TD, router, "silu", ExpertChoice(2)).experts_P
    )


def test_a_dtype_that_it_does_not_compute(make_ffn: Any, make_routing: Any) -> None:
    x_TD, layer = torch.zeros(2, 8).double(), MoELayer(make_ffn(8, 12), 4)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        op.moe(x_TD, layer, make_routing(2, 2, 1))


@pytest.mark.parametrize("forward", [op.moe, op.masked])
def test_matrices_that_it_cannot_read(make_ffn: Any, make_routing: Any, forward: Any) -> None:
    weights, routing = make_ffn(64, 40, dtype=torch.float32), make_routing(3, 4, 2)
    x_TD = torch.zeros(3, 64)
    columns_apart = weights.down_FD.t().contiguous().t()
    with pytest.raises(
        RuntimeError, match=r"rows in one piece, not \[40, 64\] with strides \[1, 40\]"
    ):
        forward(x_TD, MoELayer(replace(weights, down_FD=columns_apart), 8), routing)
    with pytest.raises(RuntimeError, match=r"rows in one piece, not \[39, 64\]"):
        forward(x_TD, MoELayer(replace(weights, up_FD=weights.up_FD[1:]), 8), routing)
    with pytest.raises(RuntimeError, match="one dtype, not BFloat16 and Float"):
        forward(x_TD, MoELayer(replace(weights, up_FD=weights.up_FD.bfloat16()), 8), routing)
