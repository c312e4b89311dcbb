"""The definition of the MoE FFN against a loop over tokens and experts, and routing by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weaver.algorithms.glu import ACTIVATIONS, GluWeights, glu_forward
from weaver.artifacts.types import SELECTIONS, Router
from weaver.kernels.grouped import grouped_forward
from weaver.kernels.reference import (
    ExpertChoice,
    MoELayer,
    Routing,
    masked_forward,
    route,
    router_logits,
)


def experts_of(routing: Routing, token: int) -> list[tuple[int, float]]:
    """Experts of one token and their factors."""
    pairs = zip(routing.experts_P.tolist(), routing.weights_P.tolist(), strict=True)
    return [pair for pair, of in zip(pairs, routing.tokens_P.tolist(), strict=True) if of == token]


def token_by_token(
    x_TD: Tensor,
    weights: GluWeights,
    routing: Routing | None,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """``y = sum_j f_j act(x gate_j + b_j) (x up_j + c_j) down_j + bias``, neuron by neuron.

    The constant of every chosen expert is added with the expert's factor.
    """
    rows = []
    for token, x_D in enumerate(x_TD):
        neurons = [(j, 1.0) for j in range(num_shared)]
        y_D = torch.zeros_like(x_D)
        if routing is not None:
            width = (weights.intermediate_size - num_shared) // routing.num_experts
            for expert, factor in experts_of(routing, token):
                start = num_shared + expert * width
                neurons += [(j, factor) for j in range(start, start + width)]
                if expert_bias_ED is not None:
                    y_D = y_D + factor * expert_bias_ED[expert]
        for j, factor in neurons:
            gate, up = x_D @ weights.gate_FD[j], x_D @ weights.up_FD[j]
            if weights.gate_bias_F is not None and weights.up_bias_F is not None:
                gate, up = gate + weights.gate_bias_F[j], up + weights.up_bias_F[j]
            y_D = y_D + factor * ACTIVATIONS[weights.activation](gate) * up * weights.down_FD[j]
        rows.append(y_D if weights.output_bias_D is None else y_D + weights.output_bias_D)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)


# T, D, S, E, N, K and what is special about the routing.
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, int]]] = {
    "ordinary": (9, 8, 5, 4, 3, 2, {}),
    "an empty expert": (9, 8, 5, 4, 3, 2, {"never": 1}),
    "the last expert empty": (9, 8, 5, 4, 3, 2, {"never": 3}),
    "one hot expert": (9, 8, 5, 4, 3, 1, {"hot": 2}),
    "all experts": (9, 8, 5, 4, 3, 4, {}),
    "one expert": (9, 8, 5, 1, 3, 1, {}),
    "one token": (1, 8, 5, 4, 3, 2, {}),
    "no token": (0, 8, 5, 4, 3, 2, {}),
    "nothing shared": (9, 8, 0, 4, 3, 2, {}),
    "nothing shared, no token": (0, 8, 0, 4, 3, 2, {}),
    "experts of one neuron": (9, 8, 5, 7, 1, 3, {}),
    "odd sizes": (13, 7, 11, 5, 9, 3, {}),
    "uneven": (13, 7, 11, 5, 9, 3, {"uneven": True}),
    "no pair": (9, 8, 5, 4, 3, 2, {"nothing": True}),
    "nothing shared, no pair": (9, 8, 0, 4, 3, 2, {"nothing": True}),
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("case", SHAPES)
def test_masked_forward_is_the_loop(
    make_ffn: Any, make_routing: Any, case: str, biases: bool
) -> None:
    tokens, hidden, shared, experts, width, top_k, special = SHAPES[case]
    weights = make_ffn(hidden, shared + experts * width, biases=biases)
    routing = make_routing(tokens, experts, top_k, **special)
    x_TD = torch.randn(tokens, hidden, dtype=torch.float64)
    bias_ED = torch.randn(experts, hidden, dtype=torch.float64) if biases else None
    y_TD = masked_forward(x_TD, MoELayer(weights, shared, bias_ED), routing)
    assert y_TD.dtype == torch.float64
    expected_TD = token_by_token(x_TD, weights, routing, shared, bias_ED)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(make_ffn: Any, make_routing: Any, activation: str) -> None:
    weights, x_TD = make_ffn(6, 14, activation=activation), torch.randn(5, 6, dtype=torch.float64)
    routing = make_routing(5, 4, 2)
    torch.testing.assert_close(
        masked_forward(x_TD, MoELayer(weights, 2), routing),
        token_by_token(x_TD, weights, routing, 2),
    )


def test_a_static_layer_is_a_smaller_dense_one(make_ffn: Any) -> None:
    weights, x_TD = make_ffn(6, 14, biases=True), torch.randn(5, 6, dtype=torch.float64)
    y_TD = masked_forward(x_TD, MoELayer(weights, 14), None)
    torch.testing.assert_close(y_TD, glu_forward(x_TD, weights))
    torch.testing.assert_close(y_TD, token_by_token(x_TD, weights, None, 14))


@pytest.mark.parametrize("forward", [masked_forward, grouped_forward])
def test_by_hand(forward: Callable[..., Tensor]) -> None:
    """Two inputs, one shared neuron, two experts of one neuron, ReLU."""
    weights = GluWeights(
        gate_FD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        up_FD=torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]),
        down_FD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 10.0]]),
        activation="relu",
    )
    x_TD = torch.tensor([[2.0, 3.0], [-1.0, 3.0]])
    # Token 0: h = (2 * 2, 3 * 6, 5 * 2) = (4, 18, 10); token 1: h = (0, 18, 2 * -1) = (0, 18, -2).
    routing = Routing.of_top_k(torch.tensor([[0], [1]]), torch.tensor([[0.5], [2.0]]), 2)
    y_TD = forward(x_TD, MoELayer(weights, 1), routing)
    assert y_TD.tolist() == [[4.0, 9.0], [-40.0, -40.0]]
    # The constants come with the factors: 0.5 * (100, 10) and 2 * (1, 7).
    constants_ED = torch.tensor([[100.0, 10.0], [1.0, 7.0]])
    y_TD = forward(x_TD, MoELayer(weights, 1, constants_ED), routing)
    assert y_TD.tolist() == [[54.0, 14.0], [-38.0, -26.0]]
    biased = replace(weights, output_bias_D=torch.tensor([1000.0, 2000.0]))
    y_TD = forward(x_TD, MoELayer(biased, 1, constants_ED), routing)
    assert y_TD.tolist() == [[1054.0, 2014.0], [962.0, 1974.0]]


def test_top_k_pairs_by_hand() -> None:
    ids_TK, weights_TK = torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.5, 2.0], [3.0, 4.0]])
    routing = Routing.of_top_k(ids_TK, weights_TK, 4)
    assert routing.tokens_P.tolist() == [0, 0, 1, 1]
    assert routing.experts_P.tolist() == [2, 0, 1, 2]
    assert routing.factors_TE().tolist() == [[2.0, 0.0, 0.5, 0.0], [0.0, 3.0, 4.0, 0.0]]
    assert routing.counts_E().tolist() == [1, 1, 2, 0]
    assert (routing.num_pairs, routing.num_tokens, routing.num_experts) == (4, 2, 4)


def test_uneven_pairs_by_hand() -> None:
    """Three tokens with two, no and one expert."""
    routing = Routing(
        torch.tensor([0, 0, 2]), torch.tensor([2, 0, 2]), torch.tensor([0.5, 0.0, 3.0]), 3, 3
    )
    assert routing.factors_TE().tolist() == [[0.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]]
    # Selected with a factor of 0 is selected.
    assert routing.selected_TE().int().tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert routing.counts_E().tolist() == [1, 0, 2]
    assert routing.num_pairs == 3


def router_probabilities(x_TD: Tensor, router: Router, activation: str) -> Tensor:
    return router_logits(x_TD, router, activation).softmax(-1)


def router_of(weight_ED: Tensor, up_weight_ED: Tensor | None = None, **values: float) -> Router:
    experts = weight_ED.shape[0]
    return Router(
        kind="linear" if up_weight_ED is None else "glu",
        weight_ED=weight_ED,
        scale_E=torch.full((experts,), values.get("scale", 0.0)),
        balance_bias_E=torch.zeros(experts),
        up_weight_ED=up_weight_ED,
    )


def test_linear_probabilities_by_hand() -> None:
    router = router_of(torch.tensor([[math.log(2.0), 0.0], [0.0, 0.0], [0.0, math.log(5.0)]]))
    # softmax(log 2, 0, 0) = (2, 1, 1) / 4; softmax(0, 0, log 5) = (1, 1, 5) / 7.
    found_TE = router_probabilities(torch.eye(2), router, "silu")
    torch.testing.assert_close(found_TE, torch.tensor([[0.5, 0.25, 0.25], [1 / 7, 1 / 7, 5 / 7]]))


def test_the_intercept_by_hand() -> None:
    weight_ED = torch.tensor([[math.log(2.0), 0.0], [0.0, 0.0], [0.0, math.log(5.0)]])
    router = replace(router_of(weight_ED), bias_E=torch.log(torch.tensor([1.0, 4.0, 2.0])))
    # Odds (2 * 1, 1 * 4, 1 * 2) and (1 * 1, 1 * 4, 5 * 2).
    found_TE = router_probabilities(torch.eye(2), router, "silu")
    expected_TE = torch.tensor([[2 / 8, 4 / 8, 2 / 8], [1 / 15, 4 / 15, 10 / 15]])
    torch.testing.assert_close(found_TE, expected_TE)
    # Unlike the balance bias, the intercept enters the factors 1 + p * scale.
    scaled = replace(router, scale_E=torch.tensor([0.0, 2.0, 3.0]))
    routing = route(torch.eye(2), scaled, "silu", ExpertChoice(1))
    assert routing.experts_P.tolist() == [1, 2]
    torch.testing.assert_close(routing.weights_P, torch.tensor([2.0, 3.0]))


def test_glu_probabilities_by_hand() -> None:
    """Scores |(x up) relu(x gate)|: the sign of up does not matter, a closed gate gives 0."""
    gate_ED = torch.tensor([[1.0], [-1.0], [2.0]])
    up_ED = torch.tensor([[-math.log(3.0)], [7.0], [math.log(3.0)]])
    found_TE = router_probabilities(torch.ones(1, 1), router_of(gate_ED, up_ED), "relu")
    # exp(|-log 3| * 1) = 3, exp(0) = 1, exp(log 3 * 2) = 9.
    torch.testing.assert_close(found_TE, torch.tensor([[3.0, 1.0, 9.0]]) / 13)


def test_the_activation_of_the_glu_router() -> None:
    router = router_of(torch.ones(2, 1), torch.tensor([[0.0], [1.0]]))
    found_TE = router_probabilities(torch.ones(1, 1), router, "silu")
    # silu(1) = 0.731059, exp(0.731059) = 2.077279.
    assert float(found_TE[0, 1]) == pytest.approx(2.077279 / 3.077279, rel=1e-5)


def test_routing_by_hand() -> None:
    router = Router(
        kind="linear",
        weight_ED=torch.log(torch.tensor([[5.0], [3.0], [2.0]])),
        scale_E=torch.tensor([10.0, 1.0, 2.0]),
        balance_bias_E=torch.tensor([-0.4, 0.0, 0.0]),
    )
    routing = route(torch.ones(1, 1), router, "silu", ExpertChoice(2))
    # Probabilities (0.5, 0.3, 0.2); with the bias (0.1, 0.3, 0.2) experts 1 and 2 win. The bias
    # does not enter the factors 1 + 0.3 * 1 and 1 + 0.2 * 2.
    assert routing.experts_P.tolist() == [1, 2]
    torch.testing.assert_close(routing.weights_P, torch.tensor([1.3, 1.4]))
    assert routing.num_experts == 3


# Logits x - (1, 2, 3) by the intercept.
THRESHOLD_ROUTER = Router(
    kind="linear",
    weight_ED=torch.eye(3),
    scale_E=torch.tensor([10.0, 1.0, 2.0]),
    balance_bias_E=torch.zeros(3),
    bias_E=torch.tensor([-1.0, -2.0, -3.0]),
)


def test_threshold_routing_by_hand() -> None:
    x_TD = torch.tensor([[1.0, 5.0, 3.5], [1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [9.0, 0.0, 0.0]])
    # Logits (0, 3, 0.5), (0, 0, 0), (1, 1, 1) and (8, -2, -3): 0 itself is not above the threshold,
    # so that the second token has no expert. top_k = 1 plays no part.
    routing = route(x_TD, THRESHOLD_ROUTER, "silu", ExpertChoice(1, "threshold"))
    assert routing.tokens_P.tolist() == [0, 0, 2, 2, 2, 3]
    assert routing.experts_P.tolist() == [1, 2, 0, 1, 2, 0]
    assert (routing.num_tokens, routing.num_experts) == (4, 3)
    assert routing.weights_P.dtype == torch.float32
    # Factors 1 + p * scale with p the softmax over all experts, selected or not.
    p_E = torch.tensor([1.0, math.exp(3.0), math.exp(0.5)]) / (1 + math.exp(3.0) + math.exp(0.5))
    last = 1 / (1 + math.exp(-10.0) + math.exp(-11.0))
    expected = [1 + p_E[1], 1 + 2 * p_E[2], 1 + 10 / 3, 1 + 1 / 3, 1 + 2 / 3, 1 + 10 * last]
    torch.testing.assert_close(routing.weights_P, torch.tensor(expected))


def test_the_balance_bias_moves_the_threshold_of_the_logits() -> None:
    x_TD = torch.tensor([[1.0, 5.0, 3.5], [1.0, 2.0, 3.0]])
    router = replace(THRESHOLD_ROUTER, balance_bias_E=torch.tensor([0.25, -3.0, -0.25]))
    # Logits (0, 3, 0.5) and (0, 0, 0), with the bias (0.25, 0, 0.25) and (0.25, -3, -0.25).
    routing = route(x_TD, router, "silu", ExpertChoice(1, "threshold"))
    assert routing.tokens_P.tolist() == [0, 0, 1]
    assert routing.experts_P.tolist() == [0, 2, 0]
    # The factors are those of the logits without it: 1 + 10 / 3 for the second token.
    assert float(routing.weights_P[2]) == pytest.approx(1 + 10 / 3)


def test_only_a_linear_router_has_a_threshold() -> None:
    router = router_of(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="a glu router selects by top-k"):
        route(torch.ones(1, 1), router, "silu", ExpertChoice(1, "threshold"))


@given(
    tokens=st.integers(0, 6),
    shared=st.integers(0, 3),
    experts=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_the_extremes_of_a_threshold(tokens: int, shared: int, experts: int, seed: int) -> None:
    """Far below the threshold only the shared part is left, far above it the dense FFN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    neurons = shared + 2 * experts
    weights = GluWeights(normal(neurons, 3), normal(neurons, 3), normal(neurons, 3), "silu")
    x_TD, router = normal(tokens, 3), router_of(normal(experts, 3))
    part_TD = glu_forward(x_TD, weights.select(torch.arange(shared)))
    for intercept, pairs, expected_TD in (
        (-1e4, 0, part_TD),
        (1e4, tokens * experts, glu_forward(x_TD, weights)),
    ):
        moved = replace(router, bias_E=torch.full((experts,), intercept))
        routing = route(x_TD, moved, "silu", ExpertChoice(1, "threshold"))
        assert routing.num_pairs == pairs
        for forward in (masked_forward, grouped_forward):
            y_TD = forward(x_TD, MoELayer(weights, shared), routing)
            torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-5)


@given(tokens=st.integers(0, 6), experts=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_routing_properties(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    router = router_of(torch.randn(experts, 3, generator=generator))
    routing = route(
        torch.randn(tokens, 3, generator=generator), router, "silu", ExpertChoice(top_k)
    )
    assert routing.tokens_P.tolist() == [token for token in range(tokens) for _ in range(top_k)]
    assert torch.equal(routing.selected_TE().sum(1), torch.full((tokens,), top_k))
    assert torch.equal(routing.weights_P, torch.ones(tokens * top_k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routing_is_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(64, 32, generator=generator).to(dtype)
    bias_E = torch.randn(16, generator=generator).to(dtype)
    router = router_of(torch.randn(16, 32, generator=generator).to(dtype), scale=1.0)
    exact = replace(router_of(router.weight_ED.float(), scale=1.0), bias_E=bias_E.float())
    router = replace(router, bias_E=bias_E)
    for selection in SELECTIONS:
        low = route(x_TD, router, "silu", ExpertChoice(4, selection))
        full = route(x_TD.float(), exact, "silu", ExpertChoice(4, selection))
        assert low.num_pairs > 0
        assert torch.equal(low.tokens_P, full.tokens_P)
        assert torch.equal(low.experts_P, full.experts_P)
        assert torch.equal(low.weights_P, full.weights_P)
        assert low.weights_P.dtype == torch.float32
