"""Quality at equal FLOPs: between two settings that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# Settings whose FLOPs differ by no more than this are compared as they are.
NEAR_FLOPS = 0.005

# Settings that are farther apart are no neighbours.
MOST_APART = 0.1


def kl_at_flops(points: Sequence[tuple[float, float]], flops: float) -> float | None:
    """KL of a method at some FLOPs, between the settings on both sides of it.

    ``ln KL`` is linear in the FLOPs between neighbours: over the range of a few points in which
    settings are compared KL falls by a constant factor per point. Settings more than ten points
    apart are no neighbours. Nothing is extrapolated, but by half of a point, which is what a fixed
    number of neurons and a router differ by.

    Args:
        points: (measured FFN FLOPs over the dense model's, KL) of the method's settings.
        flops: where the KL is wanted.
    Returns:
        KL in nats per token; None where no two settings lie around it, and none next to it.
    Raises:
        ValueError: a KL is not positive.
    """
    if any(kl <= 0 for _, kl in points):
        raise ValueError("a KL is not positive")
    ordered = sorted(points)
    for (low, kl_low), (high, kl_high) in pairwise(ordered):
        if low <= flops <= high and 0 < high - low <= MOST_APART:
            share = (flops - low) / (high - low)
            return math.exp((1 - share) * math.log(kl_low) + share * math.log(kl_high))
    near = [(abs(each - flops), kl) for each, kl in ordered if abs(each - flops) <= NEAR_FLOPS]
    return min(near)[1] if near else None
