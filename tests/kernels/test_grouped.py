"""The grouped path against the definition: outputs and gradients."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.kernels.grouped import grouped_forward
from weaver.kernels.reference import MoELayer, Routing, masked_forward

# T, D, S, E, N, K and what is special about the routing.
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, int]]] = {
    "ordinary": (33, 16, 10, 4, 6, 2, {}),
    "an empty expert": (33, 16, 10, 4, 6, 2, {"never": 0}),
    "one hot expert": (33, 16, 10, 4, 6, 1, {"hot": 2}),
    "all experts": (33, 16, 10, 4, 6, 4, {}),
    "one expert": (33, 16, 10, 1, 6, 1, {}),
    "one token": (1, 16, 10, 4, 6, 2, {}),
    "no token": (0, 16, 10, 4, 6, 2, {}),
    "nothing shared": (33, 16, 0, 4, 6, 2, {}),
    "nothing shared, no token": (0, 16, 0, 4, 6, 2, {}),
    "odd sizes": (37, 13, 11, 5, 9, 3, {}),
    "uneven": (37, 13, 11, 5, 9, 3, {"uneven": True}),
    "uneven, one hot expert": (37, 13, 11, 5, 9, 3, {"uneven": True, "hot": 1}),
    "no pair": (33, 16, 10, 4, 6, 2, {"nothing": True}),
    "nothing shared, no pair": (33, 16, 0, 4, 6, 2, {"nothing": True}),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def problem(
    make_ffn: Any, make_routing: Any, case: str, dtype: torch.dtype, *, biases: bool = True
) -> tuple[Tensor, GluWeights, Routing, int]:
    tokens, hidden, shared, experts, width, top_k, special = SHAPES[case]
    weights = make_ffn(hidden, shared + experts * width, dtype=dtype, biases=biases)
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return x_TD, weights, make_routing(tokens, experts, top_k, **special), shared


def constants(weights: GluWeights, routing: Routing) -> Tensor:
    """A constant per expert, as large as the outputs."""
    generator = torch.Generator().manual_seed(8)
    values_ED = torch.randn(routing.num_experts, weights.hidden_size, generator=generator)
    return values_ED.to(weights.gate_FD.dtype)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", SHAPES)
def test_the_same_outputs(
    make_ffn: Any, make_routing: Any, case: str, dtype: torch.dtype, biases: bool
) -> None:
    x_TD, weights, routing, shared = problem(make_ffn, make_routing, case, dtype, biases=biases)
    layer = MoELayer(weights, shared, constants(weights, routing) if biases else None)
    y_TD = grouped_forward(x_TD, layer, routing)
    expected_TD = masked_forward(x_TD, layer, routing)
    assert y_TD.dtype == expected_TD.dtype == dtype
    assert y_TD.shape == x_TD.shape
    if len(x_TD) > 1 and (shared or routing.num_pairs):
        assert 0.3 < expected_TD.float().std() < 5  # Else the absolute tolerance says nothing.
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y_TD, expected_TD, rtol=tolerance, atol=tolerance)


def test_sixteen_bit_is_as_near_to_the_truth_as_the_definition(
    make_ffn: Any, make_routing: Any
) -> None:
    x_TD, weights, routing, shared = problem(
        make_ffn, make_routing, "ordinary", torch.bfloat16, biases=False
    )
    layer = MoELayer(weights, shared, constants(weights, routing))
    truth_TD = masked_forward(x_TD.double(), layer.to(torch.float64), routing)
    grouped = (grouped_forward(x_TD, layer, routing) - truth_TD).norm()
    masked = (masked_forward(x_TD, layer, routing) - truth_TD).norm()
    assert grouped < 1.2 * masked
    assert grouped < 0.02 * truth_TD.norm()


def leaves(x_TD: Tensor, weights: GluWeights, routing: Routing) -> dict[str, Tensor]:
    named = {"x_TD": x_TD, "weights_P": routing.weights_P}
    named["expert_bias_ED"] = constants(weights, routing)
    values = {field.name: getattr(weights, field.name) for field in fields(weights)}
    named |= {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return {name: tensor.clone().requires_grad_() for name, tensor in named.items()}


def gradients(forward: Any, leaf: dict[str, Tensor], routing: Routing, shared: int) -> list[Tensor]:
    apart = {"x_TD", "weights_P", "expert_bias_ED"}
    named: dict[str, Any] = {name: leaf[name] for name in leaf if name not in apart}
    layer = MoELayer(GluWeights(activation="silu", **named), shared, leaf["expert_bias_ED"])
    y_TD = forward(leaf["x_TD"], layer, replace(routing, weights_P=leaf["weights_P"]))
    toward_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    return list(torch.autograd.grad(y_TD, list(leaf.values()), toward_TD, materialize_grads=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", SHAPES)
def test_the_same_gradients(
    make_ffn: Any, make_routing: Any, case: str, dtype: torch.dtype
) -> None:
    x_TD, weights, routing, shared = problem(make_ffn, make_routing, case, dtype)
    leaf = leaves(x_TD, weights, routing)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    found = gradients(grouped_forward, leaf, routing, shared)
    expected = gradients(masked_forward, leaf, routing, shared)
    for name, ours, theirs in zip(leaf, found, expected, strict=True):
        # The factors are float32 in both, so their gradient is rounded to it.
        limit = max(tolerance, 1e-6) if name == "weights_P" else tolerance
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit, msg=name)
        if routing.num_pairs:
            assert theirs.abs().max() > 0, name


def test_gradients_of_an_expert_without_tokens_are_zero(make_ffn: Any, make_routing: Any) -> None:
    x_TD, weights, routing, shared = problem(
        make_ffn, make_routing, "an empty expert", torch.float64
    )
    leaf = leaves(x_TD, weights, routing)
    found = dict(zip(leaf, gradients(grouped_forward, leaf, routing, shared), strict=True))
    for name in ("gate_FD", "up_FD", "down_FD"):
        assert found[name][shared : shared + 6].abs().max() == 0
        assert (found[name][shared + 6 :].abs().amax(dim=1) > 0).all()
    used_E = found["expert_bias_ED"].abs().amax(dim=1) > 0
    assert used_E.tolist() == [False, True, True, True]


def test_gradients_are_right(make_ffn: Any, make_routing: Any) -> None:
    """Against finite differences, so that both paths cannot be wrong together."""
    x_TD, weights, routing, _ = problem(make_ffn, make_routing, "odd sizes", torch.float64)
    # Three experts for the first token, two for the second, none for the third.
    pairs = {name: getattr(routing, name)[:5] for name in ("tokens_P", "experts_P", "weights_P")}
    few = replace(routing, num_tokens=3, **pairs)
    differentiated = (x_TD[:3], weights.gate_FD, constants(weights, routing))

    def forward(x_TD: Tensor, gate_FD: Tensor, bias_ED: Tensor) -> Tensor:
        return grouped_forward(x_TD, MoELayer(replace(weights, gate_FD=gate_FD), 11, bias_ED), few)

    assert torch.autograd.gradcheck(
        forward,
        tuple(tensor.clone().requires_grad_() for tensor in differentiated),
    )
