"""The one place that chooses how the MoE FFN is computed."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from weaver.artifacts.dtypes import dtype_name
from weaver.kernels.backends import SMALL, Backend, Path, backend_for, forwards, triton_slots
from weaver.kernels.costs import LayerKind, Workload, costs_of
from weaver.kernels.cpu import op as native
from weaver.kernels.reference import ExpertChoice, MoELayer, Routing, route_slots

_log = logging.getLogger(__name__)


# At or below this many tokens the CPU kernel reads the chosen rows only: skip path selection.
DECODED = 4


def layer_forward(x_TD: Tensor, layer: MoELayer, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Router and MoE FFN, as a model calls them; see ``route`` and ``masked_forward``.

    Returns:
        ``y_TD`` and the number of experts that each token uses, integers, (T,).
    """
    router = layer.router
    assert router is not None, "a static layer routes nothing"
    backend = backend_for(x_TD, layer)
    tokens, experts = x_TD.shape[0], router.weight_ED.shape[0]
    if backend == "native" and tokens <= DECODED:
        return native.decode(x_TD, layer, choice)
    # On a GPU the number of pairs is not known without waiting: a threshold counts with its mean.
    mean = Workload(layer.num_shared, experts, tokens, tokens * choice.top_k)
    if backend == "triton" and _path_of(layer, mean, backend) == "grouped":
        ids_TK, factors_TK = route_slots(x_TD, router, layer.weights.activation, choice)
        y_TD = triton_slots(x_TD, layer, ids_TK, factors_TK, experts)
        return y_TD, (ids_TK < experts).sum(1)
    routing = forwards(backend).route(x_TD, router, layer.weights.activation, choice)
    path = choose_path(layer, routing, backend)
    return forwards(backend)[path](x_TD, layer, routing), routing.counts_T()


def moe_forward(x_TD: Tensor, layer: MoELayer, routing: Routing | None) -> Tensor:
    """The MoE FFN of a given routing, by the path that ``choose_path`` names."""
    if routing is None:
        return forwards(backend_for(x_TD, layer)).masked(x_TD, layer, None)
    backend = backend_for(x_TD, layer, routing.weights_P)
    return forwards(backend)[choose_path(layer, routing, backend)](x_TD, layer, routing)


def route_tokens(x_TD: Tensor, layer: MoELayer, choice: ExpertChoice) -> Routing:
    """The experts of every token, by what computes the FFN too; see ``reference.route``."""
    assert layer.router is not None, "a static layer routes nothing"
    backend = backend_for(x_TD, layer)
    return forwards(backend).route(x_TD, layer.router, layer.weights.activation, choice)


def choose_path(layer: MoELayer, routing: Routing, backend: Backend) -> Path:
    """``grouped`` when ``costs_of`` predicts it to be faster than ``masked``.

    A function of shapes, dtype, threads, the number P of selected pairs, and the costs that are
    kept for this machine. P is what the router selected and the costs are measured once, so the
    same model gives the same bits for the same input every time. Layers too small to gain anything
    are masked without a measurement.
    """
    pairs = routing.num_pairs
    work = Workload(layer.num_shared, routing.num_experts, routing.num_tokens, pairs)
    return _path_of(layer, work, backend)


def _path_of(layer: MoELayer, work: Workload, backend: Backend) -> Path:
    gate_FD = layer.weights.gate_FD
    if backend == "torch" and gate_FD.numel() < SMALL:
        return "masked"
    neurons, hidden = gate_FD.shape
    width = (neurons - work.num_shared) // work.num_experts
    threads, device = torch.get_num_threads(), gate_FD.device.type
    kind = LayerKind(hidden, neurons, width, gate_FD.dtype, device, backend, threads)
    return _faster_path(kind, work)


# Decoding asks at every token of every layer: looking an answer up is cheaper than finding it.
@lru_cache(maxsize=65536)
def _faster_path(kind: LayerKind, work: Workload) -> Path:
    path = costs_of(kind).faster(work, kind)
    if path == "masked" and work.num_pairs < work.num_tokens * work.num_experts:
        _say_masked(kind, work.num_tokens)
    return path


# Families already warned about.
_warned: set[LayerKind] = set()


def _say_masked(kind: LayerKind, tokens: int) -> None:
    if kind in _warned:
        return
    _warned.add(kind)
    _log.warning(
        "Experts of %d x %d in %s: at %d tokens computing all of them is predicted to be faster "
        "than grouping tokens by expert, and is what is done.",
        kind.width,
        kind.hidden_size,
        dtype_name(kind.dtype),
        tokens,
    )
