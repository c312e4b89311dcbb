"""From neuron lists to a checked, canonical layout: what the methods share.

A canonical layout has ascending neuron ids inside the shared part and inside every expert, so that
two runs which find the same groups write the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.artifacts.types import ExpertLayout
from weaver.errors import WeaverError
from weaver.methods.base import LayerProblem


def routed_top_k(problem: LayerProblem, shared_experts: int) -> int:
    """K, the routed experts active per token, once some active experts are shared.

    ``K = active_experts - shared_experts``, of ``Ne - shared_experts`` routed experts

    Raises:
        WeaverError: no routed expert would be active, or all of them would always be.
    """
    active, experts = problem.active_experts, problem.num_experts
    if not 0 <= shared_experts < active:
        raise WeaverError(
            f"layer {problem.layer} has {active} active experts of {experts}, of which "
            f"{shared_experts} would be shared",
            why="at least one active expert must be a routed one",
            fix="lower the sparsity, raise --num-experts, or set shared_experts below "
            f"{max(active, 1)}",
        )
    if active >= experts:
        raise WeaverError(
            f"layer {problem.layer} has {active} active experts of {experts}",
            why="a layer whose experts are all active for every token routes nothing",
            fix="raise the sparsity or --num-experts",
        )
    return active - shared_experts


def strongest(scores_F: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` neurons with the highest scores and the others, ids ascending.

    Equal scores go to the lower id.
    """
    order_F = torch.argsort(scores_F, descending=True, stable=True)
    return order_F[:count].sort().values, order_F[count:].sort().values


def expert_layout(
    problem: LayerProblem, shared_S: Tensor, routed_n: Tensor, owner_n: Tensor, top_k: int
) -> ExpertLayout:
    """The canonical layout of an assignment of neurons to experts.

    Experts are numbered by their lowest neuron id: how a clustering happened to number its clusters
    leaves no trace.

    Args:
        problem: the layer.
        shared_S: neurons of the shared expert, (S,).
        routed_n: the other neurons, (E * N,).
        owner_n: cluster of each of ``routed_n``, in 0..E-1, (E * N,).
        top_k: K.
    """
    owner_n = owner_n.to(routed_n.device)
    clusters = [routed_n[owner_n == e].sort().values for e in range(int(owner_n.max()) + 1)]
    clusters.sort(key=lambda ids: int(ids[0]))
    return ExpertLayout(
        intermediate_size=problem.weights.intermediate_size,
        top_k=top_k,
        shared_S=shared_S.sort().values,
        experts_EN=torch.stack(clusters),
    )


def static_layout(
    problem: LayerProblem, scores_F: Tensor, output_bias_D: Tensor | None = None
) -> ExpertLayout:
    """A layout of shared neurons only: the ``active_neurons`` with the highest scores."""
    kept_S, _ = strongest(scores_F, problem.active_neurons)
    return ExpertLayout(
        intermediate_size=problem.weights.intermediate_size,
        top_k=0,
        shared_S=kept_S,
        experts_EN=kept_S.new_empty(0, 0),
        output_bias_D=output_bias_D,
    )


def dense_layout(neurons: int) -> ExpertLayout:
    """The layout of a layer that keeps all of its neurons for every token."""
    every_F = torch.arange(neurons, device="cpu")
    return ExpertLayout(
        intermediate_size=neurons,
        top_k=0,
        shared_S=every_F,
        experts_EN=every_F.new_empty(0, 0),
    )
