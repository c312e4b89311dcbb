"""The guard: which weights are the best, when a phase ends, and what is kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaver.artifacts.store import read_tensors, write_tensors
from weaver.errors import WeaverError
from weaver.training.guard import (
    Evaluation,
    Guard,
    HeldOut,
    best_path,
    load_best,
    prune_best,
    save_best,
)


def unused(_model: object) -> HeldOut:
    raise AssertionError


def seen(*kl: float, phase: int = 0, start: int = 0) -> list[Evaluation]:
    """Evaluations every 10 steps; the perplexity runs against the KL."""
    return [
        Evaluation(10 * n, phase, HeldOut(20.0 - value, value, 10.0))
        for n, value in enumerate(kl, start=start)
    ]


def test_the_lowest_is_the_best_and_of_equal_ones_the_earliest() -> None:
    evaluations = seen(0.5, 0.2, 0.4, 0.2)
    assert Guard(unused, 10).best(evaluations).step == 10
    assert Guard(unused, 10, best_by="perplexity").best(evaluations).step == 0


def test_a_phase_ends_after_its_patience() -> None:
    guard = Guard(unused, 10, patience=2)
    assert not guard.exhausted(seen(0.5), 0)
    assert not guard.exhausted(seen(0.5, 0.2, 0.3), 0)
    assert guard.exhausted(seen(0.5, 0.2, 0.3, 0.2), 0)
    assert not Guard(unused, 10).exhausted(seen(0.5, *[0.6] * 50), 0)


def test_patience_begins_again_with_each_phase() -> None:
    guard, first = Guard(unused, 10, patience=2), seen(0.5, 0.2, 0.3, 0.3)
    assert not guard.exhausted([*first, *seen(0.4, phase=1, start=4)], 1)
    assert guard.exhausted([*first, *seen(0.4, 0.4, phase=1, start=4)], 1)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=20),
    st.integers(1, 5),
)
def test_no_phase_ends_at_a_new_best(values: list[float], patience: int) -> None:
    guard, evaluations = Guard(unused, 10, patience=patience), seen(*values)
    best = guard.best(evaluations)
    assert best.held_out.kl == min(values)
    after = len(evaluations) - 1 - evaluations.index(best)
    assert guard.exhausted(evaluations, 0) == (after >= patience)


@given(st.floats(0, 1e300), st.floats(1, 1e300), st.integers(0, 10**6))
def test_an_evaluation_survives_a_checkpoint(kl: float, perplexity: float, step: int) -> None:
    found = Evaluation(step, 1, HeldOut(perplexity, kl, 2.5))
    assert Evaluation.from_dict(found.to_dict()) == found


def test_the_best_weights_on_disk(tmp_path: Path) -> None:
    for step in (0, 10, 20):
        save_best(tmp_path, step, {"a": torch.full((2,), float(step))})
    prune_best(tmp_path, {0, 20})
    assert sorted(tmp_path.iterdir()) == [best_path(tmp_path, 0), best_path(tmp_path, 20)]
    assert load_best(tmp_path, 20)["a"].tolist() == [20.0, 20.0]
    with pytest.raises(WeaverError, match=r"best-00000010\.safetensors: missing") as error:
        load_best(tmp_path, 10)
    assert error.value.fix.startswith(f"rm -r {tmp_path}")


def test_damaged_best_weights_are_named(tmp_path: Path) -> None:
    save_best(tmp_path, 3, {"a": torch.ones(2), "b": torch.ones(2)})
    tensors, metadata = read_tensors(best_path(tmp_path, 3))
    write_tensors(best_path(tmp_path, 3), {"a": tensors["a"]}, metadata)
    with pytest.raises(WeaverError, match=r"best-00000003\.safetensors: damaged, digest"):
        load_best(tmp_path, 3)
