"""Timing of several functions in turn."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of the timed runs of one function, in the order they ran.

    Args:
        seconds: one value per run.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def p10(self) -> float:
        return self.quantile(0.1)

    @property
    def p90(self) -> float:
        return self.quantile(0.9)

    def ratio_to(self, other: Timing) -> float:
        """Median over the rounds of this function's seconds over another's in the same round.

        What slows the machine down slows both runs of a round: ratios vary less than times do.

        Raises:
            ValueError: the two were not timed in the same rounds.
        """
        pairs = zip(self.seconds, other.seconds, strict=True)
        return float(np.median([mine / theirs for mine, theirs in pairs]))

    def quantile(self, share: float) -> float:
        """Quantile with linear interpolation between runs, in seconds."""
        return float(np.quantile(self.seconds, share))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    seconds: float = math.inf,
    prepare: Mapping[str, Callable[[], None]] | None = None,
) -> dict[str, Timing]:
    """Time functions in turn, A B A B ..., so that a slow minute of the machine hits all of them.

    The garbage collector is off while a round runs. On a CUDA device that is in use, the clock
    starts and stops after a synchronisation.

    Args:
        functions: what to time, by name.
        repeats: timed rounds.
        warmup: rounds before them, run in the same order and not counted.
        seconds: budget; no round begins after it, but the first timed one always runs.
        prepare: per name a function that runs before every run and is not timed.

    Returns:
        The timing of every function, by name.

    Raises:
        ValueError: no timed round, or a negative number of warm-up rounds.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} must be positive and warmup={warmup} not negative")
    taken: dict[str, list[float]] = {name: [] for name in functions}
    end = perf_counter() + seconds
    with _no_garbage_collection():
        for done in range(warmup + repeats):
            if done > warmup and perf_counter() >= end:
                break
            for name, function in functions.items():
                if prepare is not None:
                    prepare[name]()
                taken[name].append(_seconds_of(function))
    return {name: Timing(tuple(values[warmup:])) for name, values in taken.items()}


def _seconds_of(function: Callable[[], object]) -> float:
    _synchronise()
    start = perf_counter()
    function()
    _synchronise()
    return perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
