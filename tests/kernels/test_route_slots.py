"""Routing as one row of slots per token: by hand, and the same as its pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weaver.artifacts.types import Router, RouterKind, Selection, Weighting
from weaver.kernels.reference import ExpertChoice, Routing, route, route_slots


def test_slots_of_top_k_are_views() -> None:
    ids_TK, weights_TK = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.5, 2.0], [3.0, 4.0]])
    routing = Routing.of_top_k(ids_TK, weights_TK, 4)
    found_TK, factors_TK = routing.slots()
    assert found_TK.tolist() == [[2, 0], [1, 2]]
    assert factors_TK.tolist() == [[0.5, 2.0], [3.0, 4.0]]
    assert found_TK.data_ptr() == routing.experts_P.data_ptr()
    assert factors_TK.data_ptr() == routing.weights_P.data_ptr()


def test_slots_of_uneven_pairs_by_hand() -> None:
    """Three tokens with two, no and one of three experts; the factor 0 of a pair stays one."""
    routing = Routing(
        torch.tensor([0, 0, 2]), torch.tensor([2, 0, 2]), torch.tensor([0.5, 0.0, 3.0]), 3, 3
    )
    ids_TK, factors_TK = routing.slots()
    assert ids_TK.tolist() == [[0, 3, 2], [3, 3, 3], [3, 3, 2]]
    assert factors_TK.tolist() == [[0.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]


@pytest.mark.parametrize("top_k", [None, 2])
def test_slots_without_a_token(top_k: int | None) -> None:
    none_P = torch.zeros(0, dtype=torch.int64)
    ids_TK, factors_TK = Routing(none_P, none_P, torch.zeros(0), 0, 3, top_k).slots()
    assert ids_TK.shape == factors_TK.shape == (0, top_k or 3)


# Logits x - (1, 2, 3).
ROUTER = Router(
    kind="linear",
    weight_ED=torch.eye(3),
    scale_E=torch.tensor([10.0, 1.0, 2.0]),
    balance_bias_E=torch.zeros(3),
    bias_E=torch.tensor([-1.0, -2.0, -3.0]),
)


def test_route_slots_by_hand() -> None:
    x_TD = torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [1.0, 9.0, -4.0]])
    # Logits (0, 0, 0), (1, 1, 1), (0, 7, -7): nothing, everything, and the second expert.
    ids_TE, factors_TE = route_slots(x_TD, ROUTER, "silu", ExpertChoice(1, "threshold"))
    assert ids_TE.tolist() == [[3, 3, 3], [0, 1, 2], [3, 1, 3]]
    assert factors_TE.dtype == torch.float32
    even_E = torch.tensor([1 + 10 / 3, 1 + 1 / 3, 1 + 2 / 3])
    torch.testing.assert_close(factors_TE[1], even_E)
    # Likeliest first, here with odds of (1, e, 1 / e) for the last token.
    ids_TK, factors_TK = route_slots(
        torch.tensor([[1.0, 3.0, 2.0]]), ROUTER, "silu", ExpertChoice(2, "top-k")
    )
    assert ids_TK.tolist() == [[1, 0]]
    p_E = torch.tensor([0.0, 1.0, -1.0]).softmax(0)
    torch.testing.assert_close(factors_TK, torch.stack([1 + p_E[1], 1 + 10 * p_E[0]])[None])


def test_a_threshold_needs_a_linear_router() -> None:
    router = replace(ROUTER, kind="glu", up_weight_ED=torch.eye(3), bias_E=None)
    with pytest.raises(ValueError, match="a glu router selects by top-k"):
        route_slots(torch.ones(1, 3), router, "silu", ExpertChoice(1, "threshold"))


def test_softmax_weights_need_top_k() -> None:
    with pytest.raises(ValueError, match="softmax weights need selection by top-k"):
        route_slots(
            torch.ones(1, 3),
            replace(ROUTER, weighting="softmax"),
            "silu",
            ExpertChoice(1, "threshold"),
        )


def test_softmax_weights_by_hand() -> None:
    """Odds (1, e, 1/e): of the two likeliest 1 / (1 + e) and e / (1 + e), times c."""
    router = replace(ROUTER, weighting="softmax", routed_scaling=3.0)
    ids_TK, factors_TK = route_slots(
        torch.tensor([[1.0, 3.0, 2.0]]), router, "silu", ExpertChoice(2)
    )
    assert ids_TK.tolist() == [[1, 0]]
    torch.testing.assert_close(factors_TK, 3 * torch.tensor([[math.e, 1.0]]) / (1 + math.e))
    # The bias decides who is chosen, and no more: experts 0 and 2 with odds 1 and 1/e.
    biased = replace(router, balance_bias_E=torch.tensor([0.0, -1.0, 0.0]))
    ids_TK, factors_TK = route_slots(
        torch.tensor([[1.0, 3.0, 2.0]]), biased, "silu", ExpertChoice(2)
    )
    assert ids_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(factors_TK, 3 * torch.tensor([[math.e, 1.0]]) / (1 + math.e))
    # Equal logits: c / K each, 1 for summands with c = K.
    even = replace(router, weight_ED=torch.zeros(3, 3), bias_E=None, routed_scaling=2.0)
    assert (
        route_slots(torch.ones(2, 3), even, "silu", ExpertChoice(2))[1].tolist() == [[1.0, 1.0]] * 2
    )


# 0.7 in float32.
C = float(torch.tensor(0.7))


def test_one_expert_has_the_weight_c_exactly_and_a_gradient() -> None:
    x_TD = 100 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    router = replace(ROUTER, weighting="softmax", routed_scaling=0.7)
    assert set(route_slots(x_TD, router, "silu", ExpertChoice(1))[1].flatten().tolist()) == {C}
    # Chosen by its bias alone, with a probability that is 0 in float32.
    forced = replace(router, balance_bias_E=torch.tensor([2.0, 0.0, 0.0]))
    unlikely_TD = torch.tensor([[-900.0, 900.0, 0.0]])
    ids_TK, factors_TK = route_slots(unlikely_TD, forced, "silu", ExpertChoice(1))
    assert (ids_TK.tolist(), factors_TK.tolist()) == ([[0]], [[C]])
    # dw/ds_i = w (delta_i - p_i), the sum of the chosen probabilities being a constant.
    router.scale_E.requires_grad_()
    assert router.bias_E is not None
    bias_E = router.bias_E.clone().requires_grad_()
    x_TD = torch.tensor([[2.0, 3.0, 5.0]])
    ids_TK, factors_TK = route_slots(x_TD, replace(router, bias_E=bias_E), "silu", ExpertChoice(2))
    assert ids_TK.tolist() == [[2, 0]]
    (grad_E,) = torch.autograd.grad(factors_TK[0, 0], bias_E)
    p_E = torch.tensor([1.0, 1.0, 2.0]).softmax(0)
    w = 0.7 * p_E[2] / (p_E[2] + p_E[0])
    torch.testing.assert_close(grad_E, w * (torch.tensor([0.0, 0.0, 1.0]) - p_E))
    router.scale_E.requires_grad_(False)


def pairs_of(ids_TK: Tensor, factors_TK: Tensor, experts: int) -> list[tuple[int, int, float]]:
    """Token, expert and factor of the slots in use, in order."""
    return [
        (token, int(expert), float(factor))
        for token, (ids_K, factors_K) in enumerate(zip(ids_TK, factors_TK, strict=True))
        for expert, factor in zip(ids_K, factors_K, strict=True)
        if expert < experts
    ]


@pytest.mark.parametrize(
    ("kind", "selection", "weighting"),
    [
        ("linear", "top-k", "unit"),
        ("glu", "top-k", "unit"),
        ("linear", "threshold", "unit"),
        ("glu", "top-k", "softmax"),
    ],
)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_route_is_the_pairs_of_the_slots(
    kind: RouterKind, selection: Selection, weighting: Weighting, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_ED, up_ED = (torch.randn(5, 8, generator=generator) for _ in range(2))
    x_TD = torch.randn(tokens, 8, generator=generator)
    router = Router(
        kind=kind,
        weight_ED=weight_ED,
        scale_E=torch.rand(5, generator=generator),
        balance_bias_E=0.1 * torch.randn(5, generator=generator),
        up_weight_ED=up_ED if kind == "glu" else None,
        bias_E=torch.randn(5, generator=generator) if kind == "linear" else None,
        weighting=weighting,
    )
    routing = route(x_TD, router, "silu", ExpertChoice(2, selection))
    slots = route_slots(x_TD, router, "silu", ExpertChoice(2, selection))
    assert slots[0].shape == slots[1].shape == (tokens, 2 if selection == "top-k" else 5)
    pairs_P = (routing.tokens_P, routing.experts_P, routing.weights_P)
    assert list(zip(*map(Tensor.tolist, pairs_P), strict=True)) == pairs_of(*slots, 5)
    # The slots of the routing are the same, but for the factors of those that are not in use.
    assert torch.equal(routing.slots()[0], slots[0])
    assert pairs_of(*routing.slots(), 5) == pairs_of(*slots, 5)
    assert routing.top_k == (2 if selection == "top-k" else None)
    if tokens == 40:
        uneven = len(torch.bincount(routing.tokens_P).unique()) > 1
        assert uneven == (selection == "threshold")
