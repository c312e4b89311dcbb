"""The implementations of the MoE FFN, and which of them a call can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from weaver.algorithms.glu import glu_forward
from weaver.artifacts.types import Router
from weaver.kernels.cpu import build
from weaver.kernels.cpu import op as native
from weaver.kernels.grouped import grouped_forward
from weaver.kernels.reference import ExpertChoice, MoELayer, Routing, masked_forward, route

Backend = Literal["torch", "native", "triton"]
Path = Literal["masked", "grouped"]
Masked = Callable[[Tensor, MoELayer, Routing | None], Tensor]
Grouped = Callable[[Tensor, MoELayer, Routing], Tensor]

# Weights of one matrix below which the overhead of any call outweighs what it computes.
SMALL = 2**17


@dataclass(frozen=True)
class Forwards:
    """One implementation.

    Args:
        masked: all neurons, multiplied by their experts' factors; without a routing all of them.
        grouped: the chosen experts only.
        route: the experts of every token, as ``weaver.kernels.reference.route``.
    """

    masked: Masked
    grouped: Grouped
    route: Callable[[Tensor, Router, str, ExpertChoice], Routing]

    def __getitem__(self, path: Path) -> Grouped:
        return self.masked if path == "masked" else self.grouped


def forwards(backend: Backend) -> Forwards:
    """The functions of a backend."""
    if backend == "native":
        return Forwards(native.masked, native.moe, native.route)
    if backend == "triton":
        return Forwards(masked_forward, triton_forward, route)
    return Forwards(masked_forward, grouped_forward, route)


def triton_forward(x_TD: Tensor, layer: MoELayer, routing: Routing) -> Tensor:
    """The Triton kernels for a routing; see ``triton_slots``."""
    ids_TK, factors_TK = routing.slots()
    return triton_slots(x_TD, layer, ids_TK, factors_TK, routing.num_experts)


def triton_slots(
    x_TD: Tensor, layer: MoELayer, ids_TK: Tensor, factors_TK: Tensor, num_experts: int
) -> Tensor:
    """The shared expert as plain products, and the routed ones by the Triton kernels."""
    # triton is missing on macOS, and nothing but a GPU needs it.
    from weaver.kernels.gpu.op import routed_forward

    routed = layer.routed()
    return glu_forward(x_TD, layer.shared()) + routed_forward(
        x_TD,
        routed.gate_FD,
        routed.up_FD,
        routed.down_FD,
        ids_TK,
        factors_TK,
        num_experts,
        routed.activation,
        routed.gate_bias_F,
        routed.up_bias_F,
        layer.expert_bias_ED,
    )


def backend_for(x_TD: Tensor, layer: MoELayer, factors_P: Tensor | None = None) -> Backend:
    """Choose the backend of a call by device, dtype, size and whether gradients are needed.

    triton: on a CUDA device with the triton package, gradients included. native: on a CPU in one of
    its dtypes, without gradients, if the kernel can be compiled. torch: everything else, and layers
    so small (``SMALL``) that nothing is gained.

    Args:
        x_TD: inputs.
        layer: the converted FFN.
        factors_P: of a routing that is given, which may need gradients.
    """
    weights, router = layer.weights, layer.router
    size, dtype = weights.gate_FD.numel(), weights.gate_FD.dtype
    if x_TD.dtype != dtype:
        return "torch"
    if x_TD.is_cuda and find_spec("triton"):
        return "triton" if size >= SMALL and dtype in native.DTYPES else "torch"
    if x_TD.device.type != "cpu":
        return "torch"
    if torch.is_grad_enabled():
        tensors = [x_TD, weights.gate_FD, weights.up_FD, weights.down_FD, layer.expert_bias_ED]
        if router is not None:
            tensors += [router.weight_ED, router.up_weight_ED, router.bias_E, router.scale_E]
        if any(each is not None and each.requires_grad for each in (*tensors, factors_P)):
            return "torch"
    return cpu_backend(size, dtype)


def cpu_backend(size: int, dtype: torch.dtype) -> Backend:
    """Choose the backend of a call on a CPU without gradients, by size and dtype.

    Args:
        size: weights of one matrix.
        dtype: of weights and inputs.
    """
    wanted = size >= SMALL and dtype in native.DTYPES
    return "native" if wanted and build.is_available() else "torch"
