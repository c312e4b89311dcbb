"""Batches are a pure function of the step and read every window once per epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaver.training.batches import batch_indices, step_seed


@given(
    windows=st.integers(1, 30),
    batch=st.integers(1, 40),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_epoch_reads_every_window_once(
    windows: int, batch: int, epochs: int, seed: int
) -> None:
    steps = -(-epochs * windows // batch)
    order = torch.cat([batch_indices(step, windows, batch, seed) for step in range(steps)])
    for epoch in range(epochs):
        part = order[epoch * windows : (epoch + 1) * windows]
        assert part.sort().values.tolist() == list(range(windows))


def test_the_batch_size_cuts_one_and_the_same_order() -> None:
    by_two = torch.cat([batch_indices(step, 7, 2, seed=3) for step in range(6)])
    by_three = torch.cat([batch_indices(step, 7, 3, seed=3) for step in range(4)])
    assert by_two.tolist() == by_three.tolist()


def test_epochs_and_seeds_differ() -> None:
    first, second = batch_indices(0, 50, 50, seed=0), batch_indices(1, 50, 50, seed=0)
    assert first.tolist() != second.tolist()
    assert first.tolist() != batch_indices(0, 50, 50, seed=1).tolist()
    assert first.dtype == torch.int64


def test_step_seeds_differ_between_steps_and_seeds() -> None:
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 400
    assert step_seed(3, 5) == step_seed(3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1, 0), "num_windows=0 and batch_size=1 must be positive"),
        ((0, 4, 0, 0), "batch_size=0 must be positive"),
        ((-1, 4, 1, 0), "step=-1"),
        ((0, 4, 1, -2), "seed=-2"),
    ],
)
def test_bad_arguments(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)
