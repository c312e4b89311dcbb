"""The C++ kernel with the arguments that every forward path takes."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.artifacts.types import Router
from weaver.kernels.reference import ExpertChoice, MoELayer, Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moe(x_TD: Tensor, layer: MoELayer, routing: Routing) -> Tensor:
    """The MoE FFN from the chosen experts alone; see ``weaver.kernels.reference.masked_forward``.

    A slice of neurons with few tokens is read once, row by row, for all of them; with more tokens
    it is computed by matrix products: on tiles in float32 and in bfloat16, with the instructions of
    AMX or of AVX512-BF16 where the processor has them, else by torch's. Sums over neurons and
    experts are float32. Their order follows from shapes, routing and number of threads, so that a
    call repeats bit by bit.

    Args:
        x_TD: FFN inputs on the CPU, in one of ``DTYPES``, (T, D).
        layer: the converted FFN in the same dtype; rows may be strided.
        routing: the tokens' experts.
    """
    y_TD: Tensor = torch.ops.weaver_cpu.moe(
        *_common(x_TD, layer),
        layer.num_shared,
        routing.num_experts,
        routing.tokens_P,
        routing.experts_P,
        routing.weights_P,
    )
    return y_TD


def masked(x_TD: Tensor, layer: MoELayer, routing: Routing | None) -> Tensor:
    """The same from all neurons, each multiplied by its expert's factor; routing None is dense."""
    factors_TE = None if routing is None else routing.factors_TE()
    y_TD: Tensor = torch.ops.weaver_cpu.masked(*_common(x_TD, layer), layer.num_shared, factors_TE)
    return y_TD


def route(
    x_TD: Tensor,
    router: Router,
    activation: str,
    choice: ExpertChoice,
) -> Routing:
    """The experts of every token in one call; see ``weaver.kernels.reference.route``."""
    tokens_P, experts_P, factors_P = torch.ops.weaver_cpu.route(
        x_TD, *_router(router), activation, *_choice(router, choice)
    )
    k = choice.top_k if choice.selection == "top-k" else None
    experts = router.weight_ED.shape[0]
    return Routing(tokens_P, experts_P, factors_P, x_TD.shape[0], experts, k)


def decode(x_TD: Tensor, layer: MoELayer, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """``route`` and ``moe`` in one call, for a few tokens; also each token's number of experts."""
    assert layer.router is not None, "a static layer routes nothing"
    y_TD, counts_T = torch.ops.weaver_cpu.decode(
        *_common(x_TD, layer),
        layer.num_shared,
        *_router(layer.router),
        *_choice(layer.router, choice),
    )
    return y_TD, counts_T


def _choice(router: Router, choice: ExpertChoice) -> tuple[int, float, Tensor | None]:
    """K, 0 for a threshold; c of the weighting "softmax", 0 for "unit"; and ``lowest_T``."""
    threshold, unit = choice.selection == "threshold", router.weighting == "unit"
    if threshold and not unit:
        raise ValueError("softmax weights need selection by top-k")
    scaling = 0.0 if unit else router.routed_scaling
    return 0 if threshold else choice.top_k, scaling, choice.lowest_T


def _router(router: Router) -> tuple[Tensor | None, ...]:
    return (
        router.weight_ED,
        router.up_weight_ED,
        router.bias_E,
        router.scale_E,
        router.balance_bias_E,
    )


def _common(x_TD: Tensor, layer: MoELayer) -> tuple[Tensor | str | None, ...]:
    weights = layer.weights
    return (
        x_TD,
        weights.gate_FD,
        weights.up_FD,
        weights.down_FD,
        weights.gate_bias_F,
        weights.up_bias_F,
        weights.output_bias_D,
        layer.expert_bias_ED,
        weights.activation,
    )
