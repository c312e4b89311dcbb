"""Gradients of the routed part, computed in a fixed order.

The forward stores nothing for it: ``g`` and ``u`` have the same inputs, tiles and length of sums
as the product ``dy down^T`` that the backward needs anyway, so that one kernel computes all three.
That costs two of eleven GEMMs, and saves two (P, N) matrices per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from weaver.kernels.gpu.configurations import GRADIENT_NEURONS, tile_rows
from weaver.kernels.gpu.dispatch import Dispatch, dispatch_pairs
from weaver.kernels.gpu.experts import Experts
from weaver.kernels.gpu.gradients import (
    hidden_gradients_kernel,
    input_gradient_kernel,
    weight_gradient_kernel,
)
from weaver.kernels.gpu.launch import launch
from weaver.kernels.gpu.prefill import dense_factors, slot_sum


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for; a bias that is None needs none."""

    x: bool
    gate: bool
    up: bool
    down: bool
    factors: bool
    gate_bias: bool
    up_bias: bool
    expert_bias: bool


@dataclass(frozen=True)
class HiddenGradients:
    """Outputs of ``hidden_gradients_kernel`` by row of the dispatch; see there for the formulas.

    Args:
        gates_PN: gradients at the gates' pre-activations, (P, N).
        ups_PN: gradients at the ups, (P, N).
        hidden_PN: h times factor, (P, N).
        factors_P: gradients of the factors without the constants' share, by slot, float32, (P,).
    """

    gates_PN: Tensor
    ups_PN: Tensor
    hidden_PN: Tensor
    factors_P: Tensor


def routed_gradients(
    dy_TD: Tensor,
    x_TD: Tensor,
    experts: Experts,
    ids_TK: Tensor,
    factors_TK: Tensor,
    needs: Needs,
) -> dict[str, Tensor]:
    """Gradients by the names in ``Needs``, of those that are asked for.

    Args:
        dy_TD: gradient at the output, columns next to each other, (T, D).
        x_TD: inputs, columns next to each other, (T, D).
        experts: the routed experts.
        ids_TK: expert of each slot, E where it is not in use, (T, K).
        factors_TK: factor of each slot, float32, (T, K).
        needs: what is asked for.
    """
    found: dict[str, Tensor] = {}
    if needs.expert_bias:
        factors_TE = dense_factors(ids_TK, factors_TK, experts.num_experts)
        found["expert_bias"] = (factors_TE.T @ dy_TD.float()).to(dy_TD.dtype)
    block_m = tile_rows(ids_TK.numel(), experts.num_experts, x_TD.element_size())
    dispatch = dispatch_pairs(ids_TK, experts.num_experts, block_m)
    hidden = _hidden_gradients(dy_TD, x_TD, experts, factors_TK, dispatch)
    if needs.factors:
        found["factors"] = hidden.factors_P.view_as(factors_TK)
        if experts.expert_bias_ED is not None:
            found["factors"] = found["factors"] + _constants_share(
                dy_TD, ids_TK, experts.expert_bias_ED
            )
    if needs.x:
        found["x"] = _input_gradient(hidden, experts, ids_TK, dispatch)
    products = {
        "gate": (hidden.gates_PN, x_TD, needs.gate, needs.gate_bias),
        "up": (hidden.ups_PN, x_TD, needs.up, needs.up_bias),
        "down": (hidden.hidden_PN, dy_TD, needs.down, False),
    }
    for name, (left_PN, right_TD, weight, bias) in products.items():
        if weight or bias:
            found[name], bias_R = _weight_gradient(
                left_PN, right_TD, experts, dispatch, ids_TK.shape[1], with_bias=bias
            )
            if bias_R is not None:
                found[f"{name}_bias"] = bias_R
    return {name: found[name] for name, needed in vars(needs).items() if needed}


def _hidden_gradients(
    dy_TD: Tensor, x_TD: Tensor, experts: Experts, factors_TK: Tensor, dispatch: Dispatch
) -> HiddenGradients:
    pairs, blocks = factors_TK.numel(), triton.cdiv(experts.width, GRADIENT_NEURONS)
    gates_PN, ups_PN, hidden_PN = (x_TD.new_empty(pairs, experts.width) for _ in range(3))
    # Zeros, since nothing is stored for slots that are not in use.
    dfactors_PB = factors_TK.new_zeros(pairs, blocks)
    launch(
        hidden_gradients_kernel,
        lambda _: (dispatch.num_tiles, blocks),
        {
            "x_TD": x_TD,
            "dy_TD": dy_TD,
            "factors_P": factors_TK,
            "gates_PN": gates_PN,
            "ups_PN": ups_PN,
            "hidden_PN": hidden_PN,
            "dfactors_PB": dfactors_PB,
            "stride_x": x_TD.stride(0),
            "stride_dy": dy_TD.stride(0),
            "top_k": factors_TK.shape[1],
            **experts.gate_up_arguments(),
            **experts.down_arguments(),
            **experts.sizes(),
            **dispatch.arguments(),
        },
        dispatch.block_m,
    )
    return HiddenGradients(gates_PN, ups_PN, hidden_PN, dfactors_PB.sum(dim=1))


def _constants_share(dy_TD: Tensor, ids_TK: Tensor, expert_bias_ED: Tensor) -> Tensor:
    """``dy_t . b_e`` for the slots in use, 0 for others, float32, (T, K)."""
    products_TE = dy_TD.float() @ expert_bias_ED.float().T
    # A column of zeros for slots that are not in use.
    return torch.nn.functional.pad(products_TE, (0, 1)).gather(1, ids_TK.long())


def _input_gradient(
    hidden: HiddenGradients, experts: Experts, ids_TK: Tensor, dispatch: Dispatch
) -> Tensor:
    outputs_PD = hidden.gates_PN.new_empty(ids_TK.numel(), experts.hidden_size)
    launch(
        input_gradient_kernel,
        lambda sizes: (dispatch.num_tiles, triton.cdiv(experts.hidden_size, sizes["BLOCK_N"])),
        {
            "gates_PN": hidden.gates_PN,
            "ups_PN": hidden.ups_PN,
            "gate_RD": experts.gate_RD,
            "up_RD": experts.up_RD,
            "outputs_PD": outputs_PD,
            "stride_gate": experts.gate_RD.stride(0),
            "stride_up": experts.up_RD.stride(0),
            **experts.sizes(),
            **dispatch.arguments(),
        },
        dispatch.block_m,
    )
    return slot_sum(outputs_PD, ids_TK, experts)


def _weight_gradient(
    left_PN: Tensor,
    right_TD: Tensor,
    experts: Experts,
    dispatch: Dispatch,
    top_k: int,
    *,
    with_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of one matrix, (R, D), and of its bias, (R,)."""
    rows = experts.num_experts * experts.width
    weight_RD = left_PN.new_empty(rows, experts.hidden_size)
    bias_R = left_PN.new_empty(rows) if with_bias else None
    launch(
        weight_gradient_kernel,
        lambda sizes: (
            triton.cdiv(experts.width, sizes["BLOCK_M"]),
            triton.cdiv(experts.hidden_size, sizes["BLOCK_N"]),
            experts.num_experts,
        ),
        {
            "left_PN": left_PN,
            "right_TD": right_TD,
            "weight_RD": weight_RD,
            "bias_R": bias_R,
            "order_P": dispatch.order_P,
            "offsets_E": dispatch.offsets_E,
            "stride_right": right_TD.stride(0),
            "hidden_size": experts.hidden_size,
            "width": experts.width,
            "top_k": top_k,
        },
    )
    return weight_RD, bias_R
