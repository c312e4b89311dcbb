"""Single FFNs: bounds and errors by hand, synthetic cases, copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weaver.artifacts.types import Router
from weaver.evaluation.layers import (
    COMPARED,
    FEW_TOKENS,
    LayerCase,
    relative_error,
    speed_bound,
    synthetic_case,
)
from weaver.kernels.reference import MoELayer, Routing, masked_forward, router_logits
from weaver.models.accounting import LayerShape

# 16 neurons: 4 shared, 3 experts of 4, of which one is selected.
SHAPE = LayerShape(4, 3, 4, 1, "linear")


def tiny_case(tokens: int = 8, dtype: torch.dtype = torch.float32) -> LayerCase:
    return synthetic_case(SHAPE, 8, tokens, dtype)


def routing_of(case: LayerCase) -> Routing:
    routing = case.module.routing(case.x_TD)
    assert routing is not None
    return routing


def router_of(case: LayerCase) -> Router:
    assert case.module.router is not None
    return case.module.router.record()


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
    routing = routing_of(case)
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
    case.module.expert_bias = torch.nn.Parameter(
        torch.ones(3, 8, dtype=torch.float64), requires_grad=False
    )
    weights, constants_ED = case.module.weights(), case.module.expert_bias
    # Not the experts that the router would choose, and a factor of 3.
    forced = Routing.of_top_k(torch.zeros(5, 1, dtype=torch.int64), 3 * torch.ones(5, 1), 3)
    y_TD = masked_forward(case.x_TD, MoELayer(weights, 4, constants_ED), forced)
    assert relative_error(case, forced, y_TD) < 1e-14
    without_TD = masked_forward(case.x_TD, MoELayer(weights, 4), forced)
    expected = 3 * 40**0.5 / float(y_TD.norm())  # 5 * 8 values, each wrong by 3 * 1
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
        routing = routing_of(each)
        assert routing.top_k == 2
        assert routing.num_pairs == 2 * 4096
        for y_TD in (each.module(each.x_TD), each.variants["rows"](each.x_TD)):
            assert 0.5 < float(y_TD.std()) < 2
    # 2 of 8 experts: a quarter of the tokens each, or preferences that fall with the number.
    even_E, falling_E = (routing_of(each).counts_E() / 4096 for each in (case, skewed))
    assert 0.2 < float(even_E.min()) < 0.25 < float(even_E.max()) < 0.3
    assert float(falling_E[0]) > 0.6
    assert float(falling_E[-1]) < 0.1
    assert bool((falling_E[:5].diff() < 0).all())


def test_the_scores_of_a_synthetic_router() -> None:
    even_TE, skewed_TE = (
        router_logits(case.x_TD, router_of(case), "silu")
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
    tensors = (first.x_TD, first.dense.gate_FD, first.module.up_weight, router_of(first).weight_ED)
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_a_copy_shares_nothing_with_what_was_already_used() -> None:
    case = tiny_case()
    routing = routing_of(case)
    functions: dict[str, Callable[[LayerCase], Tensor]] = {
        "linear": lambda of: of.variants["linear"](of.x_TD),
        "rows": lambda of: of.variants["rows"](of.x_TD),
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


def test_a_synthetic_case_of_experts_that_overlap() -> None:
    """Six experts of eight neurons stand for a dense layer of twelve."""
    shape = LayerShape(0, 6, 8, 1, "linear", weighting="softmax")
    case = synthetic_case(shape, 16, 4, torch.float32, dense_neurons=12)
    assert case.dense.gate_FD.shape == (12, 16)
    assert case.module.gate_weight.shape == (48, 16)
    assert case.module(case.x_TD).shape == (4, 16)
