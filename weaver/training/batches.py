"""Which windows a training step sees: a function of the step alone, so resuming needs no state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def batch_indices(step: int, num_windows: int, batch_size: int, seed: int) -> Tensor:
    """Window ids of one training step.

    The windows are read in the order ``perm(seed, 0) ++ perm(seed, 1) ++ ...``, one permutation of
    all windows per epoch; step s takes the positions ``s * B .. (s + 1) * B - 1`` of that endless
    list. A batch may therefore reach from one epoch into the next, and no window is left out.

    Args:
        step: s, counted from 0.
        num_windows: W, how many windows there are.
        batch_size: B, windows per step; may be larger than W.
        seed: not negative.

    Returns:
        Window ids, int64, (B,).

    Raises:
        ValueError: an argument is negative, or there is no window or no batch.
    """
    if num_windows < 1 or batch_size < 1:
        raise ValueError(f"num_windows={num_windows} and batch_size={batch_size} must be positive")
    if step < 0 or seed < 0:
        raise ValueError(f"step={step} and seed={seed} must not be negative")
    positions_B = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs_B, offsets_B = positions_B // num_windows, positions_B % num_windows
    ids_B = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs_B):
        chosen_B = epochs_B == epoch
        # A generator per (seed, epoch): any epoch can be drawn without drawing those before it.
        permutation_W = np.random.default_rng([seed, int(epoch)]).permutation(num_windows)
        ids_B[chosen_B] = permutation_W[offsets_B[chosen_B]]
    return torch.from_numpy(ids_B)


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """Seed of the random numbers (dropout) of one training step in one process, 64 bits."""
    entropy = [seed, step, 0, process] if process else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
