"""Timing baselines of a converted FFN: the dense FFN, and the experts of transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from weaver.algorithms.glu import ACTIVATIONS, GluWeights, glu_forward
from weaver.kernels.backends import cpu_backend
from weaver.kernels.cpu import op as native
from weaver.kernels.reference import MoELayer, Routing

Forward = Callable[[Tensor], Tensor]


def dense_variants(weights: GluWeights) -> dict[str, Forward]:
    """Ways to compute the dense FFN, by name; the fastest is what a speed-up is over.

    linear: three ``torch.nn.functional.linear`` on (F, D), (F, D) and (D, F), as models have them,
    with a copy of the down projection. rows: the same with neurons as rows of all three matrices.
    native: weaver's CPU kernel on all neurons, where it can be used.
    """
    down_DF = weights.down_FD.t().contiguous()
    activate = ACTIVATIONS[weights.activation]

    def linear(x_TD: Tensor) -> Tensor:
        gate_TF = activate(functional.linear(x_TD, weights.gate_FD, weights.gate_bias_F))
        up_TF = functional.linear(x_TD, weights.up_FD, weights.up_bias_F)
        return functional.linear(gate_TF * up_TF, down_DF, weights.output_bias_D)

    found: dict[str, Forward] = {
        "linear": linear,
        "rows": partial(glu_forward, weights=weights),
    }
    is_cpu = weights.gate_FD.device.type == "cpu"
    if is_cpu and cpu_backend(weights.gate_FD.numel(), weights.gate_FD.dtype) == "native":
        layer = MoELayer(weights, weights.intermediate_size)
        found["native"] = lambda x_TD: native.masked(x_TD, layer, None)
    return found


def transformers_forward(
    layer: MoELayer, num_experts: int, implementation: str
) -> Callable[[Tensor, Routing], Tensor]:
    """The same MoE FFN with the experts of transformers, on a copy of the weights in its layout.

    The shared expert is three products beside them. Biases and constants of experts are left out:
    the experts of transformers have none.

    Args:
        layer: the converted FFN.
        num_experts: E.
        implementation: "grouped_mm" or "batched_mm".
    """
    from transformers.integrations import moe

    forward = getattr(moe, f"{implementation}_experts_forward")
    shared, routed = layer.shared(), layer.routed()
    activate = ACTIVATIONS[routed.activation]

    def by_expert(stored_RD: Tensor) -> Tensor:
        return stored_RD.view(num_experts, -1, routed.hidden_size)

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        hidden: Tensor = activate(gate) * up
        return hidden

    flags = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    experts = SimpleNamespace(
        gate_up_proj=torch.cat([by_expert(routed.gate_FD), by_expert(routed.up_FD)], dim=1),
        down_proj=by_expert(routed.down_FD).transpose(1, 2).contiguous(),
        num_experts=num_experts,
        has_gate=True,
        _apply_gate=gated,
        **dict.fromkeys(flags, False),
    )

    def with_shared(x_TD: Tensor, routing: Routing) -> Tensor:
        ids_TK, factors_TK = routing.slots()
        routed_TD: Tensor = forward(experts, x_TD, ids_TK, factors_TK)
        return glu_forward(x_TD, shared) + routed_TD

    return with_shared
