"""The one place that chooses how the MoE FFN is computed."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.types import Router
from weaver.kernels.backends import (
    SMALL,
    Backend,
    Path,
    backend_for,
    forwards,
    triton_slots,
)
from weaver.kernels.costs import LayerKind, Workload, costs_of
from weaver.kernels.cpu import op as native
from weaver.kernels.reference import ExpertChoice, Routing, route_slots

_log = logging.getLogger(__name__)


# At or below this many tokens the CPU kernel reads the chosen rows only: skip path selection.
DECODED = 4


def layer_forward(
    x_TD: Tensor,
    weights: GluWeights,
    router: Router,
    choice: ExpertChoice,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Router and MoE FFN, as a model calls them; see ``route`` and ``masked_forward``.

    Returns:
        ``y_TD`` and the number of experts that each token uses, integers, (T,).
    """
    trained = (router.weight_ED, router.up_weight_ED, router.bias_E, router.scale_E)
    backend = backend_for(x_TD, weights, *trained, expert_bias_ED)
    tokens, experts = x_TD.shape[0], router.weight_ED.shape[0]
    if backend == "native" and tokens <= DECODED:
        return native.decode(x_TD, weights, router, choice, num_shared, expert_bias_ED)
    # On a GPU the number of pairs is not known without waiting: a threshold counts with its mean.
    work = Workload(num_shared, experts, tokens, tokens * choice.top_k)
    if backend == "triton" and _chosen(weights, work, backend) == "grouped":
        slots = route_slots(x_TD, router, weights.activation, choice)
        y_TD = triton_slots(x_TD, weights, *slots, experts, num_shared, expert_bias_ED)
        return y_TD, (slots[0] < experts).sum(1)
    routing = route_tokens(x_TD, weights, router, choice)
    y_TD = moe_forward(x_TD, weights, routing, num_shared, expert_bias_ED)
    return y_TD, routing.counts_T()


def moe_forward(
    x_TD: Tensor,
    weights: GluWeights,
    routing: Routing | None,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """The MoE FFN by the path that ``choose_path`` names; see ``masked_forward``."""
    factors_P = None if routing is None else routing.weights_P
    backend = backend_for(x_TD, weights, factors_P, expert_bias_ED)
    if routing is None:
        return forwards(backend).masked(x_TD, weights, None, num_shared, None)
    path = choose_path(weights, routing, num_shared, backend)
    return forwards(backend)[path](x_TD, weights, routing, num_shared, expert_bias_ED)


def route_tokens(
    x_TD: Tensor, weights: GluWeights, router: Router, choice: ExpertChoice
) -> Routing:
    """The experts of every token, by what computes the FFN too; see ``reference.route``."""
    backend = backend_for(x_TD, weights, router.weight_ED, router.scale_E)
    return forwards(backend).route(x_TD, router, weights.activation, choice)


def choose_path(weights: GluWeights, routing: Routing, num_shared: int, backend: Backend) -> Path:
    """``grouped`` when ``costs_of`` predicts it to be faster than ``masked``.

    A function of shapes, dtype, threads, the number P of selected pairs, and the costs that are
    kept for this machine. P is what the router selected and the costs are measured once, so the
    same model gives the same bits for the same input every time. Layers too small to gain anything
    are masked without a measurement.
    """
    work = Workload(num_shared, routing.num_experts, routing.num_tokens, routing.num_pairs)
    return _chosen(weights, work, backend)


def _chosen(weights: GluWeights, work: Workload, backend: Backend) -> Path:
    neurons, hidden = weights.gate_FD.shape
    if backend == "torch" and neurons * hidden < SMALL:
        return "masked"
    dtype, device = weights.gate_FD.dtype, weights.gate_FD.device.type
    return _path(work, hidden, neurons, dtype, device, backend, torch.get_num_threads())


# Decoding asks at every token of every layer: looking an answer up is cheaper than finding it.
@lru_cache(maxsize=65536)
def _path(
    work: Workload,
    hidden: int,
    neurons: int,
    dtype: torch.dtype,
    device: str,
    backend: Backend,
    threads: int,
) -> Path:
    kind = LayerKind(
        hidden_size=hidden,
        neurons=neurons,
        width=(neurons - work.num_shared) // work.num_experts,
        dtype=dtype,
        device=device,
        backend=backend,
        threads=threads,
    )
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
