"""The routed experts as one differentiable torch operator, and the choice of kernels by T."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weaver.algorithms.glu import ACTIVATIONS
from weaver.kernels.gpu.backward import Needs, routed_gradients
from weaver.kernels.gpu.configurations import DECODE_TOKENS
from weaver.kernels.gpu.decode import decode_forward
from weaver.kernels.gpu.experts import Experts
from weaver.kernels.gpu.prefill import prefill_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def routed_forward(
    x_TD: Tensor,
    gate_RD: Tensor,
    up_RD: Tensor,
    down_RD: Tensor,
    ids_TK: Tensor,
    factors_TK: Tensor,
    num_experts: int,
    activation: str,
    gate_bias_R: Tensor | None = None,
    up_bias_R: Tensor | None = None,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """``y_t = sum_k f_tk (h_tk down_e + b_e)`` over the slots in use, e the slot's expert, (T, D).

    ``h_tk = act(x_t gate_e^T + gate_bias_e) * (x_t up_e^T + up_bias_e)``. It never waits for the
    device, sums in float32, and is differentiable, once, in everything but ``ids``. The same inputs
    give the same bits within a process; in another one tuning may choose other block sizes. The
    first call for a shape tunes and must be outside of a CUDA graph. On CPU tensors it runs in
    Triton's interpreter.

    Args:
        x_TD: FFN inputs, float32, bfloat16 or float16, (T, D).
        gate_RD: gate projections of the routed experts, row slices of the stored matrix, (R, D).
        up_RD: up projections, (R, D).
        down_RD: down projections, (R, D).
        ids_TK: expert of each slot, E where a slot is not in use, int32 or int64, (T, K). What is
            outside of 0 to E is not noticed. A token's experts differ.
        factors_TK: factor of each slot, float32, (T, K); any value where a slot is not in use.
        num_experts: E, R = E N.
        activation: a key of ``ACTIVATIONS``.
        gate_bias_R: biases of the gate projections, (R,), or None.
        up_bias_R: biases of the up projections, (R,), or None.
        expert_bias_ED: constants b_e, (E, D), or None.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    tensors = {"gate_RD": gate_RD, "up_RD": up_RD, "down_RD": down_RD}
    optional = {"gate_bias_R": gate_bias_R, "up_bias_R": up_bias_R}
    optional["expert_bias_ED"] = expert_bias_ED
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check(x_TD, tensors, ids_TK, factors_TK, num_experts, activation)
    y_TD: Tensor = _routed(
        x_TD,
        gate_RD,
        up_RD,
        down_RD,
        ids_TK,
        factors_TK,
        num_experts,
        activation,
        gate_bias_R,
        up_bias_R,
        expert_bias_ED,
    )
    return y_TD


def _check(
    x_TD: Tensor,
    tensors: dict[str, Tensor],
    ids_TK: Tensor,
    factors_TK: Tensor,
    num_experts: int,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    rows, hidden = tensors["gate_RD"].shape
    if num_experts < 1 or rows < num_experts or rows % num_experts:
        raise ValueError(f"{rows} rows do not divide into {num_experts} experts")
    if x_TD.dtype not in DTYPES:
        raise ValueError(f"inputs of {x_TD.dtype}, not float32, bfloat16 or float16")
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("gate_RD", "up_RD", "down_RD"), (rows, hidden)
    )
    wanted |= {"gate_bias_R": (rows,), "up_bias_R": (rows,)}
    wanted["expert_bias_ED"] = (num_experts, hidden)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}, not {wanted[name]}")
        if tensor.dtype != x_TD.dtype:
            raise ValueError(f"{name} of {tensor.dtype}, inputs of {x_TD.dtype}")
    if x_TD.shape != (ids_TK.shape[0], hidden) or ids_TK.shape != factors_TK.shape:
        shapes = [tuple(tensor.shape) for tensor in (x_TD, ids_TK, factors_TK)]
        raise ValueError(f"inputs, ids and factors of shapes {shapes} for D = {hidden}")
    if factors_TK.dtype != torch.float32 or ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids of {ids_TK.dtype} and factors of {factors_TK.dtype}")


@torch.library.custom_op("weaver::routed_experts", mutates_args=())
def _routed(
    x_TD: Tensor,
    gate_RD: Tensor,
    up_RD: Tensor,
    down_RD: Tensor,
    ids_TK: Tensor,
    factors_TK: Tensor,
    num_experts: int,
    activation: str,
    gate_bias_R: Tensor | None,
    up_bias_R: Tensor | None,
    expert_bias_ED: Tensor | None,
) -> Tensor:
    if ids_TK.numel() == 0:
        return x_TD.new_zeros(x_TD.shape)
    matrices, biases = (gate_RD, up_RD, down_RD), (gate_bias_R, up_bias_R, expert_bias_ED)
    experts = _experts(matrices, num_experts, activation, biases)
    forward = decode_forward if x_TD.shape[0] <= DECODE_TOKENS else prefill_forward
    return forward(_rows(x_TD), experts, ids_TK.contiguous(), factors_TK.contiguous())


@_routed.register_fake
def _(x_TD: Tensor, *_: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("weaver::routed_experts_backward", mutates_args=())
def _routed_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    gate_RD: Tensor,
    up_RD: Tensor,
    down_RD: Tensor,
    ids_TK: Tensor,
    factors_TK: Tensor,
    num_experts: int,
    activation: str,
    gate_bias_R: Tensor | None,
    up_bias_R: Tensor | None,
    expert_bias_ED: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    matrices, biases = (gate_RD, up_RD, down_RD), (gate_bias_R, up_bias_R, expert_bias_ED)
    if ids_TK.numel() == 0:
        inputs = (x_TD, *matrices, factors_TK, *biases)
        return [torch.zeros_like(tensor) for tensor in _needed(inputs, needs)]
    experts = _experts(matrices, num_experts, activation, biases)
    found = routed_gradients(
        _rows(dy_TD),
        _rows(x_TD),
        experts,
        ids_TK.contiguous(),
        factors_TK.contiguous(),
        Needs(*needs),
    )
    return list(found.values())


@_routed_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    _, *inputs, needs = arguments
    tensors = [inputs[position] for position in _DIFFERENTIABLE]
    return [tensor.new_empty(tensor.shape) for tensor in _needed(tensors, needs)]


# Where the inputs that ``Needs`` names stand among those of ``_routed``.
_DIFFERENTIABLE = (0, 1, 2, 3, 5, 8, 9, 10)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.num_experts, ctx.activation, gate_bias_R, up_bias_R, expert_bias_ED = inputs
    ctx.save_for_backward(*tensors, gate_bias_R, up_bias_R, expert_bias_ED)


def _backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, gate_bias_R, up_bias_R, expert_bias_ED = ctx.saved_tensors
    needs = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
    biases = (gate_bias_R, up_bias_R, expert_bias_ED)
    found = iter(_routed_backward(dy_TD, *tensors, ctx.num_experts, ctx.activation, *biases, needs))
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for position, needed in zip(_DIFFERENTIABLE, needs, strict=True):
        gradients[position] = next(found) if needed else None
    return tuple(gradients)


_routed.register_autograd(_backward, setup_context=_setup_context)


def _needed(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    pairs = zip(tensors, needs, strict=True)
    return [tensor for tensor, needed in pairs if needed and tensor is not None]


def _experts(
    matrices: tuple[Tensor, Tensor, Tensor],
    num_experts: int,
    activation: str,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Experts:
    gate_bias_R, up_bias_R, expert_bias_ED = (
        None if bias is None else bias.contiguous() for bias in biases
    )
    gate_RD, up_RD, down_RD = map(_rows, matrices)
    return Experts(
        gate_RD,
        up_RD,
        down_RD,
        num_experts,
        activation,
        gate_bias_R,
        up_bias_R,
        expert_bias_ED,
    )


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with columns next to each other, copied only if they are not."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
