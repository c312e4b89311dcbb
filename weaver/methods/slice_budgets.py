"""Dividing one budget of active neurons among layers whose predicted errors are known."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weaver.errors import WeaverError


@dataclass(frozen=True)
class ErrorCurve:
    """Predicted KL of one layer at some numbers of active slices.

    Args:
        slices: measured numbers of active slices, ascending.
        kl: predicted KL at each of them, nats per token.
        num_slices: Ne; with all slices active the error is zero.
    """

    slices: tuple[int, ...]
    kl: tuple[float, ...]
    num_slices: int

    def hull(self) -> list[float]:
        """Lower convex hull of the curve at ``slices[0], ..., num_slices``, the error never rising.

        On a convex curve the greedy choice of the best next slice is the optimal one.
        """
        points = list(zip((*self.slices, self.num_slices), (*self.kl, 0.0), strict=True))
        kept: list[tuple[int, float]] = []
        for point in points:
            while len(kept) > 1 and _above(kept[-2], kept[-1], point):
                kept.pop()
            kept.append(point)
        grid = np.arange(self.slices[0], self.num_slices + 1)
        values = np.interp(grid, [x for x, _ in kept], [y for _, y in kept])
        return [float(value) for value in np.minimum.accumulate(values)]

    def at(self, slices: int) -> float:
        """Predicted KL at a number of active slices, on the hull."""
        return self.hull()[max(0, slices - self.slices[0])]


def allocate_slices(
    curves: Sequence[ErrorCurve], slice_cost: float, router_cost: float, budget: float
) -> list[int]:
    """Active slices of each layer: the least total predicted KL that the budget allows.

    Starting from the smallest measured number everywhere, the slice that lowers the predicted KL
    most is added, as long as one fits. A layer all of whose slices are active needs no router.

    Args:
        curves: one per layer.
        slice_cost: cost of an active slice, in any unit.
        router_cost: cost of a layer's router in that unit.
        budget: total cost.
    Raises:
        WeaverError: not even the smallest numbers fit.
    """
    hulls = [curve.hull() for curve in curves]
    chosen = [curve.slices[0] for curve in curves]
    spent = sum(chosen) * slice_cost + len(curves) * router_cost
    if spent > budget:
        raise WeaverError(
            f"the smallest layers cost {spent:.6g} of a budget of {budget:.6g}",
            why="every layer keeps at least the smallest number of slices that was tried",
            fix="--allocation uniform, or a lower --sparsity",
        )
    queue = [(hull[1] - hull[0], layer) for layer, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, layer = heapq.heappop(queue)
        curve, hull = curves[layer], hulls[layer]
        full = chosen[layer] + 1 == curve.num_slices
        cost = slice_cost - (router_cost if full else 0.0)
        if spent + cost > budget:
            continue
        chosen[layer] += 1
        spent += cost
        position = chosen[layer] - curve.slices[0]
        if not full:
            heapq.heappush(queue, (hull[position + 1] - hull[position], layer))
    return chosen


def _above(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    """Whether the middle point lies on or above the line through the other two."""
    slope = (last[1] - first[1]) / (last[0] - first[0])
    return middle[1] >= first[1] + slope * (middle[0] - first[0])
