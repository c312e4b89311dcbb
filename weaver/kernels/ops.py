"""The one place that chooses how the MoE FFN is computed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.kernels.reference import Routing, masked_forward

Path = Literal["masked", "grouped"]


# Costs on a CPU, read off docs/benchmarks.md (scripts/bench_paths.py makes it): multiply-adds per
# second of a GEMM, seconds to gather and add one value of a token for one expert, and seconds for
# the small operations of one expert. Only ratios matter for the choice.
MACS_PER_SECOND = {torch.float32: 4.5e10, torch.bfloat16: 2.5e11}
SECONDS_PER_VALUE = 2.5e-9
SECONDS_PER_EXPERT = 6e-5


def predicted_gain(tokens: int, weights: GluWeights, routing: Routing, num_shared: int) -> float:
    """Seconds that the grouped path is predicted to save against the masked one.

    ``3 T D (E - K) N / rate - T K D v - min(E, T K) o``: the multiply-adds of the skipped experts,
    less gathering and adding K rows per token, less the overhead of every expert that is used.

    A function of shapes and dtype alone, so that the same model gives the same bits every time.
    """
    experts, top_k = routing.num_experts, routing.ids_TK.shape[1]
    width = (weights.intermediate_size - num_shared) // experts
    values = tokens * weights.hidden_size
    rate = MACS_PER_SECOND.get(weights.gate_FD.dtype, MACS_PER_SECOND[torch.float32])
    saved = 3 * values * (experts - top_k) * width / rate
    return (
        saved
        - values * top_k * SECONDS_PER_VALUE
        - min(experts, tokens * top_k) * SECONDS_PER_EXPERT
    )


def choose_path(tokens: int, weights: GluWeights, routing: Routing | None, num_shared: int) -> Path:
    """``grouped`` when that is predicted to be faster than ``masked``."""
    if routing is None or predicted_gain(tokens, weights, routing, num_shared) <= 0:
        return "masked"
    return "grouped"


def moe_forward(
    x_TD: Tensor,
    weights: GluWeights,
    routing: Routing | None,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """The MoE FFN by the path that ``choose_path`` names; see ``masked_forward``."""
    if choose_path(x_TD.shape[0], weights, routing, num_shared) == "grouped":
        assert routing is not None
        return grouped_forward(x_TD, weights, routing, num_shared, expert_bias_ED)
    return masked_forward(x_TD, weights, routing, num_shared, expert_bias_ED)


def grouped_forward(
    x_TD: Tensor,
    weights: GluWeights,
    routing: Routing,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """The same as ``masked_forward``, computing only the chosen experts.

    Tokens are sorted by expert once; each expert is a GEMM on row slices of the stored weights.
    Accumulation over experts is in float32 when the inputs are 16-bit, else in their own dtype.
    """
    tokens, top_k = routing.ids_TK.shape
    width = (weights.intermediate_size - num_shared) // routing.num_experts
    accumulator = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = glu_forward(x_TD, slice_neurons(weights, 0, num_shared)).to(accumulator)
    if expert_bias_ED is not None:
        # Skipped experts have factor 0: one product over all of them needs no gathering.
        y_TD.addmm_(routing.factors_TE().to(accumulator), expert_bias_ED.to(accumulator))
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
        y_TD.index_add_(0, picked, out * factors[start : start + count, None])
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
