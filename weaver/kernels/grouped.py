"""The chosen experts only, in torch's own operations: what can be differentiated anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.kernels.reference import Routing


def grouped_forward(
    x_TD: Tensor,
    weights: GluWeights,
    routing: Routing,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """The same as ``masked_forward``, computing only the chosen experts.

    Pairs are sorted by expert once; each expert is a GEMM on row slices of the stored weights.
    Accumulation over experts is in float32 when the inputs are 16-bit, else in their own dtype.
    """
    width = (weights.intermediate_size - num_shared) // routing.num_experts
    accumulator = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = glu_forward(x_TD, slice_neurons(weights, 0, num_shared)).to(accumulator)
    if expert_bias_ED is not None:
        # Skipped experts have factor 0: one product over all of them needs no gathering.
        y_TD.addmm_(routing.factors_TE().to(accumulator), expert_bias_ED.to(accumulator))
    order_P = routing.experts_P.argsort(stable=True)
    rows_P, factors_P = routing.tokens_P[order_P], routing.weights_P[order_P]
    start = 0
    for expert, count in enumerate(routing.counts_E().tolist()):
        if count == 0:
            continue
        picked = rows_P[start : start + count]
        begin = num_shared + expert * width
        expert_weights = slice_neurons(weights, begin, begin + width, output_bias=False)
        out = glu_forward(x_TD[picked], expert_weights).to(accumulator)
        y_TD.index_add_(0, picked, out * factors_P[start : start + count, None])
        start += count
    assert start == routing.num_pairs
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
