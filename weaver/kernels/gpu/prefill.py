"""Many tokens: grouped GEMMs over tiles of pairs, gathering the inputs as they are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaver.kernels.gpu.configurations import tile_rows
from weaver.kernels.gpu.dispatch import Dispatch, dispatch_pairs
from weaver.kernels.gpu.experts import Experts
from weaver.kernels.gpu.functions import activate, dot
from weaver.kernels.gpu.launch import launch
from weaver.kernels.gpu.variants import PrefillShape, Variant, choose_variant


@triton.jit(do_not_specialize=["top_k"])
def gate_up_kernel(
    x_TD,
    gate_RD,
    up_RD,
    gate_bias_R,
    up_bias_R,
    factors_P,
    hidden,
    order_P,
    offsets_E,
    tile_experts_M,
    tile_rows_M,
    stride_x,
    stride_gate,
    stride_up,
    stride_hidden,
    num_experts,
    hidden_size,
    width,
    top_k,
    ACTIVATION: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    """``h = act(x gate_e^T + gate_bias) * (x up_e^T + up_bias)`` of one tile and BLOCK_N neurons.

    Stored as row of the pair, (P, N); with DENSE times the pair's factor, at the token's row and
    the expert's columns of (T, R).
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_M + tile)
    if expert == num_experts:
        return
    rows_M = tl.load(tile_rows_M + tile) + tl.arange(0, BLOCK_M)
    valid_M = rows_M < tl.load(offsets_E + expert + 1)
    # Rows and neurons past the end read valid ones instead, which needs no mask in the loop; they
    # are not stored.
    slots_M = tl.load(order_P + rows_M, mask=valid_M, other=0)
    tokens_M = slots_M // top_k
    neurons_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows_N = expert * width + tl.minimum(neurons_N, width - 1)
    columns_K = tl.arange(0, BLOCK_K)
    x_MK = x_TD + tokens_M[:, None] * stride_x + columns_K[None, :]
    gate_KN = gate_RD + weight_rows_N[None, :] * stride_gate + columns_K[:, None]
    up_KN = up_RD + weight_rows_N[None, :] * stride_up + columns_K[:, None]
    gates_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        left = hidden_size - start
        x = tl.load(x_MK + start, mask=columns_K[None, :] < left, other=0.0)
        gate = tl.load(gate_KN + start, mask=columns_K[:, None] < left, other=0.0)
        gates_MN = dot(x, gate, gates_MN, UPCAST)
        up = tl.load(up_KN + start, mask=columns_K[:, None] < left, other=0.0)
        ups_MN = dot(x, up, ups_MN, UPCAST)
    if gate_bias_R is not None:
        gates_MN += tl.load(gate_bias_R + weight_rows_N).to(tl.float32)[None, :]
    if up_bias_R is not None:
        ups_MN += tl.load(up_bias_R + weight_rows_N).to(tl.float32)[None, :]
    h_MN = activate(gates_MN, ACTIVATION) * ups_MN
    stored_MN = valid_M[:, None] & (neurons_N[None, :] < width)
    if DENSE:
        h_MN *= tl.load(factors_P + slots_M, mask=valid_M, other=0.0)[:, None]
        at_MN = tokens_M[:, None] * stride_hidden + weight_rows_N[None, :]
    else:
        at_MN = rows_M[:, None] * stride_hidden + neurons_N[None, :]
    tl.store(hidden + at_MN, h_MN.to(hidden.dtype.element_ty), mask=stored_MN)


@triton.jit
def down_kernel(
    hidden_PN,
    down_RD,
    outputs_PD,
    order_P,
    offsets_E,
    tile_experts_M,
    tile_rows_M,
    stride_down,
    num_experts,
    hidden_size,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    """``o = h down_e`` of one tile and BLOCK_N of the D outputs, stored at the row of the slot.

    A token's outputs are then K successive rows.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_M + tile)
    if expert == num_experts:
        return
    first = tl.load(tile_rows_M + tile)
    rows_M = first + tl.arange(0, BLOCK_M)
    valid_M = rows_M < tl.load(offsets_E + expert + 1)
    slots_M = tl.load(order_P + rows_M, mask=valid_M, other=0)
    columns_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    neurons_K = tl.arange(0, BLOCK_K)
    h_MK = hidden_PN + tl.where(valid_M, rows_M, first)[:, None] * width + neurons_K[None, :]
    weight_rows_K = expert * width + neurons_K
    inside_N = columns_N[None, :] < hidden_size
    down_KN = down_RD + weight_rows_K[:, None] * stride_down + columns_N[None, :]
    outputs_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = width - start
        h = tl.load(h_MK + start, mask=neurons_K[None, :] < left, other=0.0)
        down = tl.load(down_KN, mask=(neurons_K[:, None] < left) & inside_N, other=0.0)
        outputs_MN = dot(h, down, outputs_MN, UPCAST)
        down_KN += BLOCK_K * stride_down
    at_MN = slots_M[:, None] * hidden_size + columns_N[None, :]
    stored_MN = valid_M[:, None] & inside_N
    tl.store(outputs_PD + at_MN, outputs_MN.to(outputs_PD.dtype.element_ty), mask=stored_MN)


@triton.jit(do_not_specialize=["top_k"])
def slot_sum_kernel(
    outputs_PD,
    ids_P,
    factors_P,
    expert_bias_ED,
    y_TD,
    num_experts,
    hidden_size,
    top_k,
    BLOCK_N: tl.constexpr,
):
    """``y_t = sum_k f_tk (o_tk + b_e)`` over the slots in use, in their order, BLOCK_N columns.

    All factors are 1 where none are given.
    """
    token = tl.program_id(0).to(tl.int64)
    columns_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < hidden_size
    y_N = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, top_k):
        slot = token * top_k + k
        expert = tl.load(ids_P + slot).to(tl.int64)
        used_N = inside_N & (expert < num_experts)
        output_N = tl.load(outputs_PD + slot * hidden_size + columns_N, mask=used_N, other=0.0)
        output_N = output_N.to(tl.float32)
        if expert_bias_ED is not None:
            constants_N = expert_bias_ED + expert * hidden_size + columns_N
            output_N += tl.load(constants_N, mask=used_N, other=0.0).to(tl.float32)
        if factors_P is not None:
            output_N *= tl.load(factors_P + slot, mask=expert < num_experts, other=0.0)
        y_N += output_N
    at_N = y_TD + token * hidden_size + columns_N
    tl.store(at_N, y_N.to(y_TD.dtype.element_ty), mask=inside_N)


def prefill_forward(
    x_TD: Tensor,
    experts: Experts,
    ids_TK: Tensor,
    factors_TK: Tensor,
    variant: Variant | None = None,
) -> Tensor:
    """The routed part for many tokens, (T, D).

    Args:
        x_TD: inputs, columns next to each other, (T, D).
        experts: the routed experts.
        ids_TK: expert of each slot, E where it is not in use, (T, K).
        factors_TK: factor of each slot, float32, (T, K).
        variant: how the down projection runs; None: as ``choose_variant`` says.
    """
    tokens, top_k = ids_TK.shape
    block_m = tile_rows(ids_TK.numel(), experts.num_experts, x_TD.element_size())
    dispatch = dispatch_pairs(ids_TK, experts.num_experts, block_m)
    if variant is None:
        sizes = (tokens, experts.hidden_size, experts.num_experts, experts.width, top_k)
        variant = choose_variant(PrefillShape(*sizes, x_TD.element_size()))
    if variant == "dense":
        hidden_TR = x_TD.new_zeros(tokens, experts.num_experts * experts.width)
        _gate_up(x_TD, experts, factors_TK, dispatch, hidden_TR, dense=True)
        return _dense_down(hidden_TR, experts, ids_TK, factors_TK)
    hidden_PN = x_TD.new_empty(ids_TK.numel(), experts.width)
    _gate_up(x_TD, experts, factors_TK, dispatch, hidden_PN, dense=False)
    outputs_PD = _down(hidden_PN, experts, dispatch)
    return slot_sum(outputs_PD, ids_TK, experts, factors_TK, experts.expert_bias_ED)


def _gate_up(
    x_TD: Tensor,
    experts: Experts,
    factors_TK: Tensor,
    dispatch: Dispatch,
    hidden: Tensor,
    *,
    dense: bool,
) -> None:
    """Fill ``hidden``, (P, N) or with ``dense`` (T, R): see ``gate_up_kernel``."""
    launch(
        gate_up_kernel,
        lambda sizes: (dispatch.num_tiles, triton.cdiv(experts.width, sizes["BLOCK_N"])),
        {
            "x_TD": x_TD,
            "factors_P": factors_TK,
            "hidden": hidden,
            "stride_x": x_TD.stride(0),
            "stride_hidden": hidden.stride(0),
            "top_k": factors_TK.shape[1],
            "DENSE": dense,
            **experts.gate_up_arguments(),
            **experts.sizes(),
            **dispatch.arguments(),
        },
        dispatch.block_m,
    )


def _down(hidden_PN: Tensor, experts: Experts, dispatch: Dispatch) -> Tensor:
    """Outputs of all pairs by slot, (P, D); rows of slots not in use are undefined."""
    outputs_PD = hidden_PN.new_empty(hidden_PN.shape[0], experts.hidden_size)
    launch(
        down_kernel,
        lambda sizes: (dispatch.num_tiles, triton.cdiv(experts.hidden_size, sizes["BLOCK_N"])),
        {
            "hidden_PN": hidden_PN,
            "outputs_PD": outputs_PD,
            **experts.down_arguments(),
            **experts.sizes(),
            **dispatch.arguments(),
        },
        dispatch.block_m,
    )
    return outputs_PD


def _dense_down(hidden_TR: Tensor, experts: Experts, ids_TK: Tensor, factors_TK: Tensor) -> Tensor:
    """``hidden down + F constants`` with F the factors, 0 for skipped experts, (T, D)."""
    if experts.expert_bias_ED is None:
        return hidden_TR @ experts.down_RD
    factors_TE = dense_factors(ids_TK, factors_TK, experts.num_experts).to(hidden_TR.dtype)
    return torch.addmm(factors_TE @ experts.expert_bias_ED, hidden_TR, experts.down_RD)


def dense_factors(ids_TK: Tensor, factors_TK: Tensor, num_experts: int) -> Tensor:
    """The factor of every expert for every token, 0 where it is skipped, (T, E)."""
    factors_TE = factors_TK.new_zeros(ids_TK.shape[0], num_experts + 1)
    # Slots not in use fall into the column that is cut off.
    return factors_TE.scatter_(1, ids_TK.long(), factors_TK)[:, :num_experts]


def slot_sum(
    outputs_PD: Tensor,
    ids_TK: Tensor,
    experts: Experts,
    factors_TK: Tensor | None = None,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """Sum a token's slots in use, see ``slot_sum_kernel``, (T, D)."""
    tokens, top_k = ids_TK.shape
    y_TD = outputs_PD.new_empty(tokens, experts.hidden_size)
    launch(
        slot_sum_kernel,
        lambda sizes: (tokens, triton.cdiv(experts.hidden_size, sizes["BLOCK_N"])),
        {
            "outputs_PD": outputs_PD,
            "ids_P": ids_TK,
            "factors_P": factors_TK,
            "expert_bias_ED": expert_bias_ED,
            "y_TD": y_TD,
            "num_experts": experts.num_experts,
            "hidden_size": experts.hidden_size,
            "top_k": top_k,
        },
    )
    return y_TD
