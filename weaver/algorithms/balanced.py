"""Balanced clustering: every cluster holds exactly the same number of points."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from weaver.algorithms.transport import Floats, solve_transport

_CHUNK_ROWS = 256


def balanced_assignment(cost_FE: Tensor, capacity: int) -> Tensor:
    """Assign F points to E clusters of exactly ``capacity`` points at the least total cost.

    ``min sum_f cost[f, owner(f)]  subject to  |{f : owner(f) = e}| = N for every e``

    The result is optimal (up to float64 rounding) at every size, equal in cost to
    ``scipy.optimize.linear_sum_assignment`` on the cost matrix with every column repeated N times;
    memory is linear in F * E. It is deterministic, ties included.

    Args:
        cost_FE: finite costs, (F, E).
        capacity: N, with F = E * N.
    Returns:
        Cluster of every point, int64, (F,).
    Raises:
        ValueError: F is not E * capacity, or a cost is not finite.
    Source: see ``weaver.algorithms.transport``.
    """
    points, clusters = cost_FE.shape
    if points != clusters * capacity or points == 0:
        raise ValueError(f"{points} points do not fill {clusters} clusters of {capacity}")
    if not bool(torch.isfinite(cost_FE).all()):
        raise ValueError("costs must be finite")
    plan = solve_transport(_as_floats(cost_FE), capacity)
    return torch.from_numpy(plan.owner_F).to(cost_FE.device)


def balanced_kmeans(
    points_FM: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    *,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """K-means with clusters of exactly F / E points, squared L2 distance.

    ``min sum_f ||x_f - c_owner(f)||^2``: centroids are seeded by greedy k-means++, then balanced
    assignment and cluster means alternate. Both steps are exact, so the objective never rises. The
    search stops when it falls by less than ``tolerance`` of its value.

    Args:
        points_FM: points, (F, M); computed in float32.
        num_clusters: E, a divisor of F.
        generator: source of the seeding's randomness, on the CPU.
        max_iterations: at most so many assignments.
        tolerance: relative fall of the objective below which the search stops; 0 goes on until the
            objective does not fall at all.
    Returns:
        The cluster of every point, int64, (F,), and the cluster means, float32, (E, M).
    Raises:
        ValueError: F is not a multiple of E, a value is not finite, or ``max_iterations`` < 1.
    Source: ExpertWeaver, arXiv:2602.15521; k-means++, Arthur and Vassilvitskii (2007), in the
        greedy variant that draws 2 + ln E candidates per centroid and keeps the best.
    """
    count = points_FM.shape[0]
    if num_clusters < 1 or count == 0 or count % num_clusters:
        raise ValueError(f"{count} points do not divide into {num_clusters} equal clusters")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations} is below 1")
    if not bool(torch.isfinite(points_FM).all()):
        raise ValueError("points must be finite")
    # Distances lose digits when all points lie far from the origin.
    points_FM = points_FM.float()
    device = points_FM.device
    centred_FM = points_FM - points_FM.mean(0)
    centroids_EM = _seed_centroids(centred_FM, num_clusters, generator)
    best_F, best = torch.empty(0, dtype=torch.int64, device=device), math.inf
    prices_E: Floats | None = None
    for _ in range(max_iterations):
        cost_FE = _as_floats(_relative_distances(centred_FM, centroids_EM))
        plan = solve_transport(cost_FE, count // num_clusters, prices_E)
        prices_E = plan.prices_E
        owner_F = torch.from_numpy(plan.owner_F).to(device)
        centroids_EM = cluster_means(centred_FM, owner_F, num_clusters)
        objective = within_cluster_cost(centred_FM, owner_F, centroids_EM)
        previous = best
        if objective < best:
            best_F, best = owner_F, objective
        if objective >= previous * (1.0 - tolerance):
            break
    return best_F, cluster_means(points_FM, best_F, num_clusters)


def cluster_means(points_FM: Tensor, owner_F: Tensor, num_clusters: int) -> Tensor:
    """Mean point of every cluster, float32, (E, M); no cluster may be empty."""
    sums_EM = torch.zeros(num_clusters, points_FM.shape[1], device=points_FM.device)
    sums_EM.index_add_(0, owner_F, points_FM.float())
    return sums_EM / torch.bincount(owner_F, minlength=num_clusters)[:, None]


def within_cluster_cost(points_FM: Tensor, owner_F: Tensor, centroids_EM: Tensor) -> float:
    """The k-means objective ``sum_f ||x_f - c_owner(f)||^2``, summed in float64."""
    total = 0.0
    for rows_nM, owners_n in zip(
        points_FM.split(_CHUNK_ROWS), owner_F.split(_CHUNK_ROWS), strict=True
    ):
        distance_n = (rows_nM - centroids_EM[owners_n]).square_().sum(1)
        total += float(distance_n.sum(dtype=torch.float64))
    return total


def _relative_distances(points_FM: Tensor, centroids_EM: Tensor) -> Tensor:
    """Squared distances less what is equal for all c, ``||c||^2 - 2 x.c``, (F, E)."""
    return torch.addmm(centroids_EM.square().sum(1), points_FM, centroids_EM.T, alpha=-2.0)


def _seed_centroids(points_FM: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: points drawn in proportion to their distance from the seeds so far, (E, M).

    Of several candidates the one that lowers the total distance most becomes the next seed.
    """
    count = points_FM.shape[0]
    trials = 2 + int(math.log(num_clusters))
    square_F1 = torch.linalg.vector_norm(points_FM, dim=1, keepdim=True).square()
    chosen = [int(torch.randint(count, (1,), generator=generator, device="cpu"))]
    nearest_F = square_F1[:, 0] + _relative_distances(points_FM, points_FM[chosen])[:, 0]
    nearest_F = nearest_F.clamp_min(0.0)
    for _ in range(1, num_clusters):
        # Where only copies of the seeds are left, any point is as good as another.
        weight_F = nearest_F if bool(nearest_F.sum() > 0) else torch.ones_like(nearest_F)
        candidates_n = torch.multinomial(
            weight_F.cpu(), trials, replacement=True, generator=generator
        ).to(points_FM.device)
        distances_Fn = square_F1 + _relative_distances(points_FM, points_FM[candidates_n])
        distances_Fn = torch.minimum(distances_Fn.clamp_min(0.0), nearest_F[:, None])
        best = int(distances_Fn.sum(0).argmin())
        chosen.append(int(candidates_n[best]))
        nearest_F = distances_Fn[:, best]
    return points_FM[chosen]


def _as_floats(values: Tensor) -> Floats:
    return values.detach().to("cpu", torch.float64).numpy().astype(np.float64, copy=False)
