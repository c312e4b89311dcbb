"""CMoE: experts of neurons that are marked by the same tokens (analytical restructuring)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from weaver.algorithms.balanced import balanced_assignment
from weaver.algorithms.markers import l1_distances, marker_columns, mean_columns
from weaver.algorithms.statistics import activation_rates
from weaver.artifacts.types import ExpertLayout
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import expert_layout, routed_top_k, strongest


class CmoeOptions(MethodOptions):
    """Options of CMoE.

    Args:
        shared_experts: slices that are always active; None takes half of the active ones, rounded
            down: S3A3E8 at 25% sparsity, S2A2E8 at 50%.
        iterations: balanced assignments; after the first one the centroids are cluster means.
    """

    shared_experts: int | None = Field(None, ge=0)
    iterations: int = Field(1, gt=0)


def partition(
    problem: LayerProblem, options: CmoeOptions, generator: torch.Generator
) -> ExpertLayout:
    """Share the most often marked neurons and cluster the rest by their marker columns.

    ``mu_j`` is the share of tokens that mark neuron j. The shared neurons are those with the
    highest mu; the E routed neurons with the highest mu seed the centroids; the rest go to them by
    balanced assignment on the L1 distance of marker columns.

    Args:
        problem: the layer; its profile holds the markers, so K_a is set at calibration.
        options: shared slices and iterations; leftover neurons are shared too.
        generator: not used, the method draws nothing.
    Raises:
        WeaverError: no routed expert would be active, or all of them.
    Source: CMoE, arXiv:2502.04416, section 4.1; the L1 distance and the single iteration are those
        of the released code. Deviation: the assignment is exact as in the paper, but not found
        with Jonker-Volgenant on an expanded matrix (see ``weaver.algorithms.transport``).
    """
    del generator
    shared_experts = options.shared_experts
    if shared_experts is None:
        shared_experts = problem.active_experts // 2
    top_k = routed_top_k(problem, shared_experts)
    rates_F = shared_scores(problem, options)
    shared = problem.leftover_neurons + shared_experts * problem.expert_width
    shared_S, routed_n = strongest(rates_F, shared)
    seeds_e, _ = strongest(rates_F[routed_n], problem.num_experts - shared_experts)
    owner_n = _cluster_markers(problem, routed_n, seeds_e, options.iterations)
    return expert_layout(problem, shared_S, routed_n, owner_n, top_k)


def shared_scores(problem: LayerProblem, options: CmoeOptions) -> Tensor:
    """``mu``, the share of tokens that mark each neuron (``activation_rates``), (F,)."""
    del options
    return activation_rates(problem.profile.marker_neurons_TA, problem.weights.intermediate_size)


def _cluster_markers(
    problem: LayerProblem, routed_n: Tensor, seeds_e: Tensor, iterations: int
) -> Tensor:
    """Cluster of every routed neuron, (E * N,)."""
    binary_nT = marker_columns(
        problem.profile.marker_neurons_TA, routed_n, problem.weights.intermediate_size
    )
    centroids_ET = binary_nT[seeds_e.cpu().numpy()].toarray()
    owner_n = torch.empty(0, dtype=torch.int64, device="cpu")
    for iteration in range(iterations):
        if iteration > 0:
            centroids_ET = mean_columns(binary_nT, owner_n, seeds_e.numel())
        cost_nE = torch.from_numpy(l1_distances(binary_nT, centroids_ET))
        owner_n = balanced_assignment(cost_nE, problem.expert_width)
    return owner_n
