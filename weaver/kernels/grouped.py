"""The chosen experts only, in torch's own operations: what can be differentiated anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.algorithms.glu import glu_forward
from weaver.kernels.reference import MoELayer, Routing


def grouped_forward(x_TD: Tensor, layer: MoELayer, routing: Routing) -> Tensor:
    """The same as ``masked_forward``, computing only the chosen experts.

    Pairs are sorted by expert once; each expert is a GEMM on row slices of the stored weights.
    Accumulation over experts is in float32 when the inputs are 16-bit, else in their own dtype.
    """
    routed, expert_bias_ED = layer.routed(), layer.expert_bias_ED
    width = routed.intermediate_size // routing.num_experts
    accumulator = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = glu_forward(x_TD, layer.shared()).to(accumulator)
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
        rows = routed.rows(expert * width, (expert + 1) * width)
        out = glu_forward(x_TD[picked], rows).to(accumulator)
        y_TD.index_add_(0, picked, out * factors_P[start : start + count, None])
        start += count
    assert start == routing.num_pairs
    return y_TD.to(x_TD.dtype)
