"""The one place that chooses how the MoE FFN is computed."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.types import Router, Selection
from weaver.kernels.backends import SMALL, Backend, Path, backend_for, forwards
from weaver.kernels.costs import Family, Workload, costs_of
from weaver.kernels.reference import Routing

_log = logging.getLogger(__name__)


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
    x_TD: Tensor,
    weights: GluWeights,
    router: Router,
    top_k: int,
    selection: Selection = "top-k",
) -> Routing:
    """The experts of every token, by what computes the FFN too; see ``reference.route``."""
    backend = backend_for(x_TD, weights, router.weight_ED, router.scale_E)
    return forwards(backend).route(x_TD, router, weights.activation, top_k, selection)


def choose_path(weights: GluWeights, routing: Routing, num_shared: int, backend: Backend) -> Path:
    """``grouped`` when ``costs_of`` predicts it to be faster than ``masked``.

    A function of shapes, dtype, threads, the number P of selected pairs, and the costs that are
    kept for this machine. P is what the router selected and the costs are measured once, so the
    same model gives the same bits for the same input every time. Layers too small to gain anything
    are masked without a measurement.
    """
    neurons, hidden = weights.gate_FD.shape
    experts, tokens = routing.num_experts, routing.num_tokens
    if backend == "torch" and neurons * hidden < SMALL:
        return "masked"
    family = Family(
        hidden_size=hidden,
        neurons=neurons,
        width=(neurons - num_shared) // experts,
        dtype=weights.gate_FD.dtype,
        device=weights.gate_FD.device.type,
        backend=backend,
        threads=torch.get_num_threads(),
    )
    work = Workload(num_shared, experts, tokens, routing.num_pairs)
    path = costs_of(family).faster(work, family)
    if path == "masked" and routing.num_pairs < tokens * experts:
        _say_masked(family, tokens)
    return path


# The families of which it was said that they are computed in full.
_said: set[Family] = set()


def _say_masked(family: Family, tokens: int) -> None:
    if family in _said:
        return
    _said.add(family)
    _log.warning(
        "Experts of %d x %d in %s: at %d tokens computing all of them is predicted to be faster "
        "than grouping tokens by expert, and is what is done.",
        family.width,
        family.hidden_size,
        str(family.dtype).removeprefix("torch."),
        tokens,
    )
