"""Kernels of the backward pass: grouped GEMMs over the same tiles as the forward."""

import triton
import triton.language as tl

from weaver.kernels.gpu.functions import activate, activation_slope, dot


@triton.jit(do_not_specialize=["top_k"])
def hidden_gradients_kernel(
    x_TD,
    dy_TD,
    gate_RD,
    up_RD,
    down_RD,
    gate_bias_R,
    up_bias_R,
    factors_P,
    gates_PN,
    ups_PN,
    hidden_PN,
    dfactors_PB,
    order_P,
    offsets_E,
    tile_experts_M,
    tile_rows_M,
    stride_x,
    stride_dy,
    stride_gate,
    stride_up,
    stride_down,
    num_experts,
    hidden_size,
    width,
    top_k,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    """Gradients at one tile's pre-activations; ``g`` and ``u`` are computed again, beside ``q``.

    With ``q = dy down_e^T`` and factor f: ``gates = f q u act'(g)``, ``ups = f q act(g)``,
    ``hidden = f act(g) u``, each (P, N), and ``dfactors = sum_n q h`` over the BLOCK_N neurons, at
    the row of the slot and the column of the block.
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_M + tile)
    if expert == num_experts:
        return
    rows_M = tl.load(tile_rows_M + tile) + tl.arange(0, BLOCK_M)
    valid_M = rows_M < tl.load(offsets_E + expert + 1)
    slots_M = tl.load(order_P + rows_M, mask=valid_M, other=0)
    tokens_M = slots_M // top_k
    neurons_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_rows_N = expert * width + tl.minimum(neurons_N, width - 1)
    columns_K = tl.arange(0, BLOCK_K)
    x_MK = x_TD + tokens_M[:, None] * stride_x + columns_K[None, :]
    dy_MK = dy_TD + tokens_M[:, None] * stride_dy + columns_K[None, :]
    gate_KN = gate_RD + weight_rows_N[None, :] * stride_gate + columns_K[:, None]
    up_KN = up_RD + weight_rows_N[None, :] * stride_up + columns_K[:, None]
    down_KN = down_RD + weight_rows_N[None, :] * stride_down + columns_K[:, None]
    g_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    q_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, hidden_size, BLOCK_K):
        left = hidden_size - start
        x = tl.load(x_MK + start, mask=columns_K[None, :] < left, other=0.0)
        gate = tl.load(gate_KN + start, mask=columns_K[:, None] < left, other=0.0)
        g_MN = dot(x, gate, g_MN, UPCAST)
        up = tl.load(up_KN + start, mask=columns_K[:, None] < left, other=0.0)
        u_MN = dot(x, up, u_MN, UPCAST)
        dy = tl.load(dy_MK + start, mask=columns_K[None, :] < left, other=0.0)
        down = tl.load(down_KN + start, mask=columns_K[:, None] < left, other=0.0)
        q_MN = dot(dy, down, q_MN, UPCAST)
    if gate_bias_R is not None:
        g_MN += tl.load(gate_bias_R + weight_rows_N).to(tl.float32)[None, :]
    if up_bias_R is not None:
        u_MN += tl.load(up_bias_R + weight_rows_N).to(tl.float32)[None, :]
    inside_N = neurons_N < width
    at_MN = rows_M[:, None] * width + neurons_N[None, :]
    stored_MN = valid_M[:, None] & inside_N[None, :]
    factors_M = tl.load(factors_P + slots_M, mask=valid_M, other=0.0)[:, None]
    a_MN = activate(g_MN, ACTIVATION)
    h_MN = a_MN * u_MN
    dfactors_M = tl.sum(tl.where(inside_N[None, :], q_MN * h_MN, 0.0), axis=1)
    column = tl.program_id(1)
    blocks = tl.cdiv(width, BLOCK_N)
    tl.store(dfactors_PB + slots_M * blocks + column, dfactors_M, mask=valid_M)
    element = hidden_PN.dtype.element_ty
    tl.store(hidden_PN + at_MN, (factors_M * h_MN).to(element), mask=stored_MN)
    q_MN *= factors_M
    tl.store(ups_PN + at_MN, (q_MN * a_MN).to(element), mask=stored_MN)
    q_MN *= u_MN * activation_slope(g_MN, ACTIVATION)
    tl.store(gates_PN + at_MN, q_MN.to(element), mask=stored_MN)


@triton.jit
def input_gradient_kernel(
    gates_PN,
    ups_PN,
    gate_RD,
    up_RD,
    outputs_PD,
    order_P,
    offsets_E,
    tile_experts_M,
    tile_rows_M,
    stride_gate,
    stride_up,
    num_experts,
    hidden_size,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    """Compute each pair's term of dx, ``gates gate_e + ups up_e``, at its slot's row, (P, D)."""
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
    at_MK = tl.where(valid_M, rows_M, first)[:, None] * width + neurons_K[None, :]
    weight_rows_K = expert * width + neurons_K
    inside_N = columns_N[None, :] < hidden_size
    gate_KN = gate_RD + weight_rows_K[:, None] * stride_gate + columns_N[None, :]
    up_KN = up_RD + weight_rows_K[:, None] * stride_up + columns_N[None, :]
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        left = width - start
        inside_KN = (neurons_K[:, None] < left) & inside_N
        gates = tl.load(gates_PN + at_MK + start, mask=neurons_K[None, :] < left, other=0.0)
        gate = tl.load(gate_KN, mask=inside_KN, other=0.0)
        sums_MN = dot(gates, gate, sums_MN, UPCAST)
        ups = tl.load(ups_PN + at_MK + start, mask=neurons_K[None, :] < left, other=0.0)
        up = tl.load(up_KN, mask=inside_KN, other=0.0)
        sums_MN = dot(ups, up, sums_MN, UPCAST)
        gate_KN += BLOCK_K * stride_gate
        up_KN += BLOCK_K * stride_up
    at_MN = slots_M[:, None] * hidden_size + columns_N[None, :]
    stored_MN = valid_M[:, None] & inside_N
    tl.store(outputs_PD + at_MN, sums_MN.to(outputs_PD.dtype.element_ty), mask=stored_MN)


@triton.jit(do_not_specialize=["top_k"])
def weight_gradient_kernel(
    left_PN,
    right_TD,
    weight_RD,
    bias_R,
    order_P,
    offsets_E,
    stride_right,
    hidden_size,
    width,
    top_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr = False,
):
    """``left_e^T right_e`` over the pairs of one expert: BLOCK_M neurons, BLOCK_N columns.

    Row p of ``right_e`` is the row of ``right`` that belongs to the pair's token. ``bias`` gets the
    column sums of ``left_e``. Without pairs both are 0.
    """
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_E + expert)
    count = tl.load(offsets_E + expert + 1) - begin
    neurons_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M = neurons_M < width
    inside_N = columns_N < hidden_size
    pairs_K = tl.arange(0, BLOCK_K)
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_M = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, count, BLOCK_K):
        valid_K = pairs_K < count - start
        rows_K = begin + start + pairs_K
        tokens_K = tl.load(order_P + rows_K, mask=valid_K, other=0) // top_k
        left_MK = left_PN + rows_K[None, :] * width + neurons_M[:, None]
        left = tl.load(left_MK, mask=valid_K[None, :] & inside_M[:, None], other=0.0)
        right_KN = right_TD + tokens_K[:, None] * stride_right + columns_N[None, :]
        right = tl.load(right_KN, mask=valid_K[:, None] & inside_N[None, :], other=0.0)
        sums_MN = dot(left, right, sums_MN, UPCAST)
        if bias_R is not None:
            bias_M += tl.sum(left.to(tl.float32), axis=1)
    weight_rows_M = expert * width + neurons_M
    at_MN = weight_RD + weight_rows_M[:, None] * hidden_size + columns_N[None, :]
    stored_MN = inside_M[:, None] & inside_N[None, :]
    tl.store(at_MN, sums_MN.to(weight_RD.dtype.element_ty), mask=stored_MN)
    if bias_R is not None:
        # Every block of columns has the same sums; the first one stores them.
        stored_M = inside_M & (tl.program_id(1) == 0)
        tl.store(bias_R + weight_rows_M, bias_M.to(bias_R.dtype.element_ty), mask=stored_M)
