"""Bootstrap intervals of means, plain and paired."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator

CONFIDENCE = 0.95


def bootstrap_interval(
    values: Sequence[float], generator: Generator, samples: int = 1000
) -> tuple[float, float, float]:
    """Mean and percentile interval (95%) of the mean under resampling with replacement.

    Args:
        values: one value per unit (window or item).
        generator: source of the resampling; equal seeds give equal intervals.
        samples: number of resamples.
    Returns:
        (mean, low, high).
    Raises:
        ValueError: there is no value, or ``samples`` is not positive.
    """
    if not values or samples < 1:
        raise ValueError(f"{len(values)} values and {samples} samples: need at least one of each")
    values_N = torch.tensor(values, dtype=torch.float64, device="cpu")
    count = len(values)
    # One resample at a time: a (samples, count) index matrix of 10,000 items would take 80 MB.
    means = torch.stack(
        [
            values_N[torch.randint(count, (count,), generator=generator, device="cpu")].mean()
            for _ in range(samples)
        ]
    )
    tail = (1.0 - CONFIDENCE) / 2
    low, high = means.quantile(values_N.new_tensor([tail, 1.0 - tail])).tolist()
    return values_N.mean().item(), low, high


def paired_bootstrap(
    values_a: Sequence[float],
    values_b: Sequence[float],
    generator: Generator,
    samples: int = 1000,
) -> tuple[float, float, float]:
    """Mean of ``a - b`` and its 95% percentile interval, resampling units in pairs.

    Pairing removes what both share (a hard window is hard for both), so differences much smaller
    than the spread of either list can be told from zero.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if len(values_a) != len(values_b):
        raise ValueError(f"paired values differ in number: {len(values_a)} and {len(values_b)}")
    differences = [a - b for a, b in zip(values_a, values_b, strict=True)]
    return bootstrap_interval(differences, generator, samples)
