"""A few tokens: two launches that stream the weights of the experts in use, without sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from weaver.kernels.gpu.experts import Experts
from weaver.kernels.gpu.functions import activate
from weaver.kernels.gpu.launch import launch


@triton.jit(do_not_specialize=["top_k"])
def decode_hidden_kernel(
    x_TD,
    gate_RD,
    up_RD,
    gate_bias_R,
    up_bias_R,
    ids_P,
    factors_P,
    weighted_PN,
    stride_x,
    stride_gate,
    stride_up,
    num_experts,
    hidden_size,
    width,
    top_k,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``f act(x gate_e^T + gate_bias) * (x up_e^T + up_bias)`` of one slot and BLOCK_N neurons.

    In float32. Nothing is stored for a slot that is not in use.
    """
    slot = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_P + slot).to(tl.int64)
    if expert >= num_experts:
        return
    neurons_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows_N = expert * width + tl.minimum(neurons_N, width - 1)
    columns_K = tl.arange(0, BLOCK_K)
    x_K = x_TD + (slot // top_k) * stride_x + columns_K
    gate_NK = gate_RD + weight_rows_N[:, None] * stride_gate + columns_K[None, :]
    up_NK = up_RD + weight_rows_N[:, None] * stride_up + columns_K[None, :]
    # Products are added up per column and across columns once, at the end.
    gates_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    ups_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        inside_K = columns_K < hidden_size - start
        x = tl.load(x_K + start, mask=inside_K, other=0.0).to(tl.float32)[None, :]
        gate = tl.load(gate_NK + start, mask=inside_K[None, :], other=0.0)
        gates_NK += x * gate.to(tl.float32)
        up = tl.load(up_NK + start, mask=inside_K[None, :], other=0.0)
        ups_NK += x * up.to(tl.float32)
    gates_N = tl.sum(gates_NK, axis=1)
    ups_N = tl.sum(ups_NK, axis=1)
    if gate_bias_R is not None:
        gates_N += tl.load(gate_bias_R + weight_rows_N).to(tl.float32)
    if up_bias_R is not None:
        ups_N += tl.load(up_bias_R + weight_rows_N).to(tl.float32)
    h_N = tl.load(factors_P + slot) * activate(gates_N, ACTIVATION) * ups_N
    tl.store(weighted_PN + slot * width + neurons_N, h_N, mask=neurons_N < width)


@triton.jit(do_not_specialize=["top_k"])
def decode_down_kernel(
    weighted_PN,
    down_RD,
    ids_P,
    factors_P,
    expert_bias_ED,
    y_TD,
    stride_down,
    num_experts,
    hidden_size,
    width,
    top_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y_t = sum_k (h_tk down_e + f_tk b_e)`` over the slots in use, in order, BLOCK_N columns."""
    token = tl.program_id(0).to(tl.int64)
    columns_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = columns_N < hidden_size
    neurons_K = tl.arange(0, BLOCK_K)
    sums_KN = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    constants_N = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, top_k):
        slot = token * top_k + k
        expert = tl.load(ids_P + slot).to(tl.int64)
        # A slot that is not in use is a loop of length 0.
        count = tl.where(expert < num_experts, width, 0)
        down_KN = down_RD + (expert * width + neurons_K)[:, None] * stride_down + columns_N[None, :]
        h_K = weighted_PN + slot * width + neurons_K
        for start in range(0, count, BLOCK_K):
            inside_K = neurons_K < width - start
            h = tl.load(h_K + start, mask=inside_K, other=0.0)
            mask_KN = inside_K[:, None] & inside_N[None, :]
            down = tl.load(down_KN, mask=mask_KN, other=0.0)
            sums_KN += h[:, None] * down.to(tl.float32)
            down_KN += BLOCK_K * stride_down
        if expert_bias_ED is not None:
            used_N = inside_N & (expert < num_experts)
            bias_N = expert_bias_ED + expert * hidden_size + columns_N
            constant_N = tl.load(bias_N, mask=used_N, other=0.0).to(tl.float32)
            factor = tl.load(factors_P + slot, mask=expert < num_experts, other=0.0)
            constants_N += factor * constant_N
    y_N = tl.sum(sums_KN, axis=0) + constants_N
    at_N = y_TD + token * hidden_size + columns_N
    tl.store(at_N, y_N.to(y_TD.dtype.element_ty), mask=inside_N)


def decode_forward(x_TD: Tensor, experts: Experts, ids_TK: Tensor, factors_TK: Tensor) -> Tensor:
    """The routed part for a few tokens, (T, D); arguments as of ``prefill_forward``.

    Two launches whose grids depend on shapes alone, as a CUDA graph requires.
    """
    tokens, top_k = ids_TK.shape
    pairs, width, hidden = tokens * top_k, experts.width, experts.hidden_size
    weighted_PN = x_TD.new_empty(pairs, width, dtype=torch.float32)
    routing = {"ids_P": ids_TK, "factors_P": factors_TK, "top_k": top_k}
    launch(
        decode_hidden_kernel,
        lambda sizes: (pairs, triton.cdiv(width, sizes["BLOCK_N"])),
        {
            "x_TD": x_TD,
            "weighted_PN": weighted_PN,
            "stride_x": x_TD.stride(0),
            **routing,
            **experts.gate_up_arguments(),
            **experts.sizes(),
        },
    )
    y_TD = x_TD.new_empty(tokens, hidden)
    launch(
        decode_down_kernel,
        lambda sizes: (tokens, triton.cdiv(hidden, sizes["BLOCK_N"])),
        {
            "y_TD": y_TD,
            "weighted_PN": weighted_PN,
            "expert_bias_ED": experts.expert_bias_ED,
            **routing,
            **experts.down_arguments(),
            **experts.sizes(),
        },
    )
    return y_TD
