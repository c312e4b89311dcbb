"""The one place that chooses how the MoE FFN is computed."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Workload:
    """Sizes that decide what an MoE FFN costs.

    Args:
        hidden_size: D.
        num_shared: S.
        num_experts: E; 0 for a dense FFN of S neurons.
        width: N.
        num_tokens: T.
        num_pairs: P, selected pairs of token and expert, T K for top-k.
        dtype: of the weights.
        router_rows: R, rows of the router's matrices.
    """

    hidden_size: int
    num_shared: int
    num_experts: int
    width: int
    num_tokens: int
    num_pairs: int
    dtype: torch.dtype
    router_rows: int = 0


def predicted_seconds(work: Workload, path: Path) -> float:
    """Seconds that a path is predicted to take on one thread of the CPU in docs/benchmarks.md.

    masked: ``3 D T (S + E N) / rate``; grouped: ``3 D (T S + P N) / rate + P D v + min(E, P) o``;
    both and ``D T R / rate32`` for the router, which computes in float32.

    Covered are the multiply-adds of all matrices, gathering and adding a row per pair, and the
    overhead of every expert that is used. Left out are reading the weights, biases and constants,
    the masks, and the selection. With one or few tokens reading the weights takes longer than
    multiplying by them: seconds are then too low, and the overhead weighs too much in a ratio of
    two of them.
    """
    slow = MACS_PER_SECOND[torch.float32]
    rate = MACS_PER_SECOND.get(work.dtype, slow)
    router = work.hidden_size * work.num_tokens * work.router_rows / slow
    used = work.num_tokens * work.num_experts if path == "masked" else work.num_pairs
    neurons = work.num_tokens * work.num_shared + used * work.width
    seconds = 3 * work.hidden_size * neurons / rate + router
    if path == "masked":
        return seconds
    moved = work.num_pairs * work.hidden_size * SECONDS_PER_VALUE
    return seconds + moved + min(work.num_experts, work.num_pairs) * SECONDS_PER_EXPERT


def predicted_gain(weights: GluWeights, routing: Routing, num_shared: int) -> float:
    """Seconds that the grouped path is predicted to save against the masked one.

    ``3 D (T E - P) N / rate - P D v - min(E, P) o`` with P pairs of token and selected expert, see
    ``predicted_seconds``: the multiply-adds of the skipped pairs, less what grouping costs.

    A function of shapes and dtype alone, P among them. P is what the router selected, not a
    measurement, so the same model gives the same bits for the same input every time.
    """
    work = Workload(
        hidden_size=weights.hidden_size,
        num_shared=num_shared,
        num_experts=routing.num_experts,
        width=(weights.intermediate_size - num_shared) // routing.num_experts,
        num_tokens=routing.num_tokens,
        num_pairs=routing.num_pairs,
        dtype=weights.gate_FD.dtype,
    )
    return predicted_seconds(work, "masked") - predicted_seconds(work, "grouped")


def choose_path(weights: GluWeights, routing: Routing | None, num_shared: int) -> Path:
    """``grouped`` when that is predicted to be faster than ``masked``."""
    if routing is None or predicted_gain(weights, routing, num_shared) <= 0:
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
    if choose_path(weights, routing, num_shared) == "grouped":
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
