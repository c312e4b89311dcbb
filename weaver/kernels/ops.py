"""The one place that chooses how the MoE FFN is computed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.kernels.reference import Routing, masked_forward

Path = Literal["masked", "grouped"]


def choose_path(tokens: int, weights: GluWeights, routing: Routing | None, num_shared: int) -> Path:
    """``grouped`` when an expert's average GEMM is large enough to pay for its own launch.

    Every expert costs about six small operations; they pay when the multiply-adds that each one
    saves against the masked path outweigh them. ``docs/benchmarks.md`` has the measurement.
    """
    if routing is None:
        return "masked"
    top_k = routing.ids_TK.shape[1]
    routed = weights.intermediate_size - num_shared
    skipped_share = 1.0 - top_k / routing.num_experts
    saved = tokens * routed * weights.hidden_size * 3 * skipped_share / routing.num_experts
    return "grouped" if saved >= GROUPED_MIN_SAVED_MACS else "masked"


# Multiply-adds that one expert must save to be worth its own six operations.
GROUPED_MIN_SAVED_MACS = 4_000_000


def moe_forward(
    x_TD: Tensor, weights: GluWeights, routing: Routing | None, num_shared: int
) -> Tensor:
    """The MoE FFN by the path that ``choose_path`` names; see ``masked_forward``."""
    if choose_path(x_TD.shape[0], weights, routing, num_shared) == "grouped":
        assert routing is not None
        return grouped_forward(x_TD, weights, routing, num_shared)
    return masked_forward(x_TD, weights, routing, num_shared)


def grouped_forward(x_TD: Tensor, weights: GluWeights, routing: Routing, num_shared: int) -> Tensor:
    """The same as ``masked_forward``, computing only the chosen experts.

    Tokens are sorted by expert once; each expert is a GEMM on row slices of the stored weights.
    Accumulation over experts is in float32 when the inputs are 16-bit, else in their own dtype.
    """
    tokens, top_k = routing.ids_TK.shape
    width = (weights.intermediate_size - num_shared) // routing.num_experts
    accumulator = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = glu_forward(x_TD, slice_neurons(weights, 0, num_shared)).to(accumulator)
    flat_ids = routing.ids_TK.reshape(-1)
    order = flat_ids.argsort(stable=True)
    counts = torch.bincount(flat_ids, minlength=routing.num_experts).tolist()
    factors = routing.weights_TK.reshape(-1)[order]
    rows = order // top_k
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        picked = rows[start : start + count]
        begin = num_shared + expert * width
        expert_weights = slice_neurons(weights, begin, begin + width, output_bias=False)
        out = glu_forward(x_TD[picked], expert_weights).to(accumulator)
        y_TD = y_TD.index_add(0, picked, out * factors[start : start + count, None])
        start += count
    assert start == tokens * top_k
    return y_TD.to(x_TD.dtype)


def slice_neurons(
    weights: GluWeights, begin: int, end: int, *, output_bias: bool = True
) -> GluWeights:
    """Rows ``begin:end`` of the stored FFN, without copying."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[begin:end]

    return GluWeights(
        gate_FD=weights.gate_FD[begin:end],
        up_FD=weights.up_FD[begin:end],
        down_FD=weights.down_FD[begin:end],
        activation=weights.activation,
        gate_bias_F=rows(weights.gate_bias_F),
        up_bias_F=rows(weights.up_bias_F),
        output_bias_D=weights.output_bias_D if output_bias else None,
    )
