"""Routed experts of awkward shapes, with what the definition gives for them in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.kernels.gpu.dispatch import Dispatch, dispatch_pairs
from weaver.kernels.gpu.experts import Experts
from weaver.kernels.reference import MoELayer, Routing, masked_forward

# Relative to the norm of the truth.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Problem:
    """Inputs, stored weights (S + R, D) and constants in one dtype, and the routing as slots.

    Slots that are not in use have id E and NaN as factor.
    """

    x_TD: Tensor
    stored: GluWeights
    routing: Routing
    ids_TK: Tensor
    factors_TK: Tensor
    num_shared: int
    expert_bias_ED: Tensor | None

    @property
    def layer(self) -> MoELayer:
        return MoELayer(self.stored, self.num_shared, self.expert_bias_ED)

    @property
    def experts(self) -> Experts:
        """The routed rows: views into the stored matrices."""
        rows = self.layer.routed()
        return Experts(
            rows.gate_FD,
            rows.up_FD,
            rows.down_FD,
            self.routing.num_experts,
            rows.activation,
            rows.gate_bias_F,
            rows.up_bias_F,
            self.expert_bias_ED,
        )

    def truth(self) -> Tensor:
        """The routed part in float64, from the same rounded numbers."""
        routed = MoELayer(self.layer.routed(), 0, self.expert_bias_ED).to(torch.float64)
        return masked_forward(self.x_TD.double(), routed, self.routing)


# T, D, S, E, N, slots per token, and what is special about the routing. Tiles have 16 rows.
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, int]]] = {
    "ordinary": (33, 40, 10, 4, 24, 2, {}),
    "an empty expert": (20, 32, 10, 4, 32, 2, {"never": 0}),
    "the last expert empty": (20, 32, 10, 4, 32, 2, {"never": 3}),
    "one hot expert": (50, 24, 5, 3, 20, 1, {"hot": 1}),
    "all experts": (18, 16, 6, 4, 16, 4, {}),
    "one expert": (18, 16, 6, 1, 16, 1, {}),
    "odd sizes": (37, 45, 11, 5, 35, 3, {}),
    "uneven": (37, 45, 11, 5, 35, 3, {"uneven": True}),
    "uneven, a slot per expert": (17, 20, 3, 4, 12, 4, {"uneven": True, "hot": 1}),
    "no pair": (17, 20, 3, 4, 12, 2, {"nothing": True}),
    "nothing shared": (9, 16, 0, 4, 6, 2, {}),
    "experts of one neuron": (9, 8, 5, 7, 1, 3, {}),
}
FEW_TOKENS: dict[str, tuple[int, int, int, int, int, int, dict[str, int]]] = {
    "one token": (1, 40, 10, 4, 24, 2, {}),
    "four tokens": (4, 32, 10, 4, 32, 2, {}),
    "odd sizes, one token": (1, 45, 11, 5, 35, 3, {}),
    "odd sizes, uneven": (4, 37, 0, 5, 35, 3, {"uneven": True}),
    "all experts, one token": (1, 16, 6, 4, 16, 4, {}),
    "one expert, one token": (1, 16, 6, 1, 16, 1, {}),
    "one hot expert, few tokens": (3, 16, 6, 4, 8, 1, {"hot": 2}),
    "no pair, one token": (1, 16, 6, 4, 8, 2, {"nothing": True}),
}


def slots(routing: Routing, top_k: int) -> tuple[Tensor, Tensor]:
    """The pairs of each token in its first slots."""
    ids_TK = torch.full((routing.num_tokens, top_k), routing.num_experts)
    factors_TK = torch.full((routing.num_tokens, top_k), float("nan"))
    used = [0] * routing.num_tokens
    for pair, token in enumerate(routing.tokens_P.tolist()):
        ids_TK[token, used[token]] = routing.experts_P[pair]
        factors_TK[token, used[token]] = routing.weights_P[pair]
        used[token] += 1
    return ids_TK, factors_TK


def relative_error(found: Tensor, truth: Tensor) -> float:
    """``|found - truth| / |truth|``; the truth must be neither 0 nor tiny."""
    scale = truth.double().pow(2).mean().sqrt()
    assert 1e-2 < scale < 1e2, f"values of size {scale} say little"
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def tiles_backward(ids_TK: Tensor, num_experts: int, block_m: int) -> Dispatch:
    """``dispatch_pairs`` with the tiles from last to first."""
    found = dispatch_pairs(ids_TK, num_experts, block_m)
    experts_M, rows_M = found.tile_experts_M.flip(0), found.tile_rows_M.flip(0)
    return replace(found, tile_experts_M=experts_M, tile_rows_M=rows_M)
