"""Weight clustering: experts of neurons with similar up-projection rows (LLaMA-MoE)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn import functional

from weaver.algorithms.balanced import balanced_kmeans
from weaver.artifacts.types import ExpertLayout
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import expert_layout, routed_top_k, strongest


class WeightKmeansOptions(MethodOptions):
    """Options of the weight clustering.

    Args:
        shared_experts: slices that are always active.
    """

    shared_experts: int = Field(0, ge=0)


def partition(
    problem: LayerProblem, options: WeightKmeansOptions, generator: torch.Generator
) -> ExpertLayout:
    """Balanced k-means on the L2-normalised rows of the up projection.

    ``min sum_j ||wu^_j - c_owner(j)||^2`` with equal clusters, ``wu^_j = Wu_j / ||Wu_j||_2``

    Args:
        problem: the layer.
        options: how many slices are shared.
        generator: source of the k-means seeding.
    Raises:
        WeaverError: no routed expert would be active, or all of them.
    Source: LLaMA-MoE, arXiv:2406.16554, "Independent (Clustering)". Deviation: where neurons are
        shared (the paper's split has none; here those left over when F is not a multiple of Ne, and
        ``shared_experts`` slices) they are the ones with the highest mean ``|g|``, as in
        ExpertWeaver, so that only the clustering differs.
    """
    top_k = routed_top_k(problem, options.shared_experts)
    shared = problem.leftover_neurons + options.shared_experts * problem.expert_width
    shared_S, routed_n = strongest(problem.profile.gate_abs_mean_F, shared)
    rows_nD = functional.normalize(problem.weights.up_FD[routed_n].float(), dim=1)
    owner_n, _ = balanced_kmeans(rows_nD, routed_n.numel() // problem.expert_width, generator)
    return expert_layout(problem, shared_S, routed_n, owner_n, top_k)
