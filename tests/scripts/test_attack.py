"""``make attack`` in short: a few inputs of each kind, flips, and one run that is killed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import attack
import attack_inputs
import pytest


@pytest.mark.parametrize("kind", attack_inputs.KINDS)
def test_malformed_inputs(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    for seed in range(25):
        (tmp_path / str(seed)).mkdir()
        found[attack_inputs.attack(kind, seed, tiny_llama, tmp_path / str(seed))] += 1
    assert set(found) <= {"refused", "accepted"}
    assert found["refused"] > 5


def test_what_goes_wrong_is_counted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise KeyError("vocab")

    monkeypatch.setitem(attack_inputs.KINDS, "broken", broken)
    assert attack_inputs.attack("broken", 0, tiny_llama, tmp_path) == "KeyError"


def test_flipped_bits(tiny_llama: Path, tmp_path: Path) -> None:
    assert attack.corruptions(tiny_llama, tmp_path, 40) == {"refused": 40}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2])
def test_a_run_that_is_killed(number: int, tiny_llama: Path, tmp_path: Path) -> None:
    sent, result = attack.stopped(tiny_llama, tmp_path, number, kills=3)
    assert result == "clean"
    assert sum(sent.values()) > 0
