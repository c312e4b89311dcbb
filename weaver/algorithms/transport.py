"""Capacity-limited assignment: an exact solver whose memory is linear in points times clusters.

Assigning F points to E clusters of exactly N places each is a transport problem. Its dual has one
price per cluster: at the right prices every point simply takes the cheapest cluster,
``argmin_e c[f, e] + p[e]``, and every cluster is exactly full. The solver works in two phases.

1. Price search: Newton steps on the entropy-smoothed dual, with falling temperature. It leaves a
   few misplaced points, whatever F is.
2. Repair: successive shortest paths on the graph of clusters, where the edge a -> b is the cheapest
   move of a point from a to b. Each path carries one point (or a batch of tied ones) from an
   overfull to an underfull cluster, and keeps the assignment optimal for its present counts. When
   all counts are right the assignment is optimal; nothing is approximated but float rounding.

The second phase alone would be exact too; the first one only makes it short. The expanded F x F
matrix that ``scipy.optimize.linear_sum_assignment`` needs is never built.

Source: successive shortest paths with node potentials, Ahuja, Magnanti and Orlin, "Network Flows",
section 9.7; the smoothed dual, Cuturi and Peyre, arXiv:1803.00567, sections 4.4 and 5.3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Temperatures in units of the mean cost above a point's cheapest cluster. Prices that misplace no
# more than this share of the points start at the entry _WARM; from worse ones Newton's method
# fails at low temperatures.
_TEMPERATURES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_WARM = 3
_GOOD_START = 0.02
_NEWTON_STEPS = 6
# Moves whose costs differ by less than this share of the largest cost count as tied: rounding.
_TIE = 4 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class TransportPlan:
    """An optimal assignment and the prices that prove it.

    Args:
        owner_F: cluster of every point, int64, (F,).
        prices_E: price per cluster, float64, (E,); a start for a similar problem.
    """

    owner_F: Ints
    prices_E: Floats


def solve_transport(
    cost_FE: Floats, capacity: int, start_prices_E: Floats | None = None
) -> TransportPlan:
    """Assign every point to a cluster, each cluster exactly ``capacity`` times, at least cost.

    Args:
        cost_FE: finite costs, float64, (F, E) with F = E * capacity.
        capacity: N, points per cluster.
        start_prices_E: prices of a similar problem, (E,); they only save time.
    Returns:
        The optimal plan; ties are broken the same way in every run.
    """
    if start_prices_E is None:
        start_prices_E = np.zeros(cost_FE.shape[1])
    # 1. Prices at which nearly every cluster is full.
    prices_E = _search_prices(cost_FE, capacity, start_prices_E)
    # 2. The few misplaced points, along cheapest paths.
    repair = _Repair(cost_FE, capacity, prices_E)
    repair.run()
    return TransportPlan(repair.owner_F, repair.prices_E)


def _search_prices(cost_FE: Floats, capacity: int, prices_E: Floats) -> Floats:
    """Prices whose cheapest-cluster assignment has nearly equal counts, (E,)."""
    # A cluster per row: sums and minima over the clusters then run along contiguous memory.
    relative_EF = (cost_FE - cost_FE.min(axis=1, keepdims=True)).T.astype(np.float32, order="C")
    scale = float(relative_EF.mean())
    if scale == 0.0:
        return prices_E
    best_E, fewest = prices_E, _misplaced(cost_FE, capacity, prices_E)
    good_start = fewest <= _GOOD_START * cost_FE.shape[0]
    for temperature in _TEMPERATURES[_WARM if good_start else 0 :]:
        prices_E = _newton(relative_EF, capacity, prices_E, temperature * scale)
        misplaced = _misplaced(cost_FE, capacity, prices_E)
        if misplaced < fewest:
            best_E, fewest = prices_E, misplaced
        if fewest <= cost_FE.shape[1]:
            break
    return best_E


def _misplaced(cost_FE: Floats, capacity: int, prices_E: Floats) -> int:
    """Points above capacity when every point takes its cheapest cluster."""
    owner_F = (cost_FE + prices_E).argmin(axis=1)
    counts_E = np.bincount(owner_F, minlength=cost_FE.shape[1])
    return int(np.maximum(counts_E - capacity, 0).sum())


def _newton(
    relative_EF: NDArray[np.float32], capacity: int, prices_E: Floats, temperature: float
) -> Floats:
    """Newton's method on the smoothed dual at one temperature t.

    ``D(p) = -t sum_f log sum_e exp(-(c[f, e] + p[e]) / t) - N sum_e p[e]`` is concave; with the
    soft assignment P its gradient is ``P 1 - N`` and its Hessian ``-(diag(P 1) - P P^T) / t``.
    """
    soft_EF, value = _smoothed_dual(relative_EF, capacity, prices_E, temperature)
    for _ in range(_NEWTON_STEPS):
        # Gradient: how far each cluster's soft count is from N.
        counts_E = soft_EF.sum(axis=1, dtype=np.float64)
        excess_E = counts_E - capacity
        if np.abs(excess_E).max() < 0.01 * capacity:
            break
        curvature_EE = np.diag(counts_E) - (soft_EF @ soft_EF.T).astype(np.float64)
        # The Hessian is singular along equal prices and nearly so for empty clusters.
        curvature_EE[np.diag_indices_from(curvature_EE)] += 1e-3 * capacity
        step_E = temperature * np.linalg.solve(curvature_EE, excess_E)
        # Halve the step until the dual rises.
        share = 1.0
        while True:
            trial_E = prices_E + share * step_E
            trial_EF, trial = _smoothed_dual(relative_EF, capacity, trial_E, temperature)
            if trial > value or share < 0.02:
                break
            share /= 2
        if trial <= value:
            break
        prices_E, soft_EF, value = trial_E, trial_EF, trial
    return prices_E


def _smoothed_dual(
    relative_EF: NDArray[np.float32], capacity: int, prices_E: Floats, temperature: float
) -> tuple[NDArray[np.float32], float]:
    """The soft assignment P, (E, F), and the value of the smoothed dual."""
    soft_EF = relative_EF + prices_E.astype(np.float32)[:, None]
    least_F = soft_EF.min(axis=0)
    soft_EF -= least_F
    soft_EF *= np.float32(-1.0 / temperature)
    # Below exp(-40) the products in P P^T would be denormal numbers, which are very slow.
    np.maximum(soft_EF, np.float32(-40.0), out=soft_EF)
    np.exp(soft_EF, out=soft_EF)
    total_F = soft_EF.sum(axis=0)
    soft_EF /= total_F
    log_sum = np.log(total_F).sum(dtype=np.float64)
    value = least_F.sum(dtype=np.float64) - temperature * log_sum - capacity * prices_E.sum()
    return soft_EF, float(value)


class _Repair:
    """Successive shortest paths from overfull to underfull clusters."""

    def __init__(self, cost_FE: Floats, capacity: int, prices_E: Floats) -> None:
        self.cost_FE = cost_FE
        self.capacity = capacity
        self.prices_E = prices_E.copy()
        self.owner_F: Ints = (cost_FE + prices_E).argmin(axis=1)
        clusters = cost_FE.shape[1]
        self.counts_E = np.bincount(self.owner_F, minlength=clusters)
        self.tie = _TIE * float(np.abs(cost_FE).max())
        # move_EE[a, b]: least extra cost of moving a point from a to b; mover_EE: that point.
        self.move_EE = np.full((clusters, clusters), np.inf)
        self.mover_EE = np.zeros((clusters, clusters), dtype=np.int64)
        for cluster in range(clusters):
            self._refresh(cluster)

    def run(self) -> None:
        """Augment until every cluster holds exactly ``capacity`` points."""
        while (self.counts_E > self.capacity).any():
            path = self._shortest_path()
            self._shift(path)

    def _refresh(self, cluster: int) -> None:
        """Recompute the cheapest moves out of one cluster."""
        members = np.flatnonzero(self.owner_F == cluster)
        if members.size == 0:
            self.move_EE[cluster] = np.inf
            return
        rows_nE = self.cost_FE[members]
        rows_nE -= rows_nE[:, cluster, None]
        best_E = rows_nE.argmin(axis=0)
        self.mover_EE[cluster] = members[best_E]
        self.move_EE[cluster] = np.take_along_axis(rows_nE, best_E[None], axis=0)[0]

    def _shortest_path(self) -> list[int]:
        """Clusters on the cheapest path from an overfull to an underfull one; updates the prices.

        Bellman-Ford on reduced costs, which are at least 0 but for rounding; the few hops that
        shortest paths have make it quicker here than a heap.
        """
        reduced_EE = self.move_EE + self.prices_E - self.prices_E[:, None]
        np.maximum(reduced_EE, 0.0, out=reduced_EE)
        distance_E = np.where(self.counts_E > self.capacity, 0.0, np.inf)
        previous_E = np.full(distance_E.shape, -1)
        while True:
            through_EE = distance_E[:, None] + reduced_EE
            source_E = through_EE.argmin(axis=0)
            candidate_E = np.take_along_axis(through_EE, source_E[None], axis=0)[0]
            better_E = candidate_E < distance_E
            if not better_E.any():
                break
            distance_E = np.where(better_E, candidate_E, distance_E)
            previous_E = np.where(better_E, source_E, previous_E)
        # End at the nearest underfull cluster; its distance keeps reduced costs at or above 0.
        underfull_E = self.counts_E < self.capacity
        cluster = int(np.where(underfull_E, distance_E, np.inf).argmin())
        self.prices_E -= np.minimum(distance_E, distance_E[cluster])
        path = [cluster]
        while previous_E[cluster] >= 0:
            cluster = int(previous_E[cluster])
            path.append(cluster)
        return path[::-1]

    def _shift(self, path: list[int]) -> None:
        """Move one point along every edge of the path, or as many as are tied on all edges."""
        first, last = path[0], path[-1]
        limit = min(self.counts_E[first] - self.capacity, self.capacity - self.counts_E[last])
        edges = list(itertools.pairwise(path))
        movers = [self.mover_EE[edge][None] for edge in edges]
        if limit > 1:
            tied = [self._tied(*edge) for edge in edges]
            limit = min(limit, *(len(points) for points in tied))
            if limit > 1:
                movers = [points[:limit] for points in tied]
        for points, (_, target) in zip(movers, edges, strict=True):
            self.owner_F[points] = target
        self.counts_E[first] -= len(movers[0])
        self.counts_E[last] += len(movers[0])
        for cluster in path:
            self._refresh(cluster)

    def _tied(self, source: int, target: int) -> Ints:
        """Points of ``source`` whose move to ``target`` costs no more than the cheapest one."""
        members = np.flatnonzero(self.owner_F == source)
        extra_n = self.cost_FE[members, target] - self.cost_FE[members, source]
        tied: Ints = members[extra_n <= self.move_EE[source, target] + self.tie]
        return tied
