"""``make attack`` in short: a few inputs of each kind, flips, and rounds that are killed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attack
import attack_inputs
import pytest
from attack_page import document
from attack_stops import STOCK, Round, finish, repeated, stopped, without_room
from tiny_runs import run_config, run_stages

from weaver.methods.registry import METHODS


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
    run_stages(run_config(tiny_llama), tmp_path, until="eval")
    found = attack.Found()
    attack.corruptions(tmp_path, 40, found)
    assert {stage: counts["refused"] for stage, counts in found.flips.items()} == dict.fromkeys(
        ("calibrate", "partition", "router", "model", "eval"), 8
    )
    assert not found.wrong


@pytest.fixture
def round_(tiny_llama: Path, tmp_path: Path) -> Callable[[int], Round]:
    """Makes rounds on a model that everybody may read, in folders that everybody may enter."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for path in model.iterdir():
        path.chmod(0o644)
    return lambda number: Round.make(number, model, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_round_that_is_killed(number: int, round_: Callable[[int], Round]) -> None:
    sent, result = stopped(round_(number), 1)
    assert result == "clean"
    assert sum(sent.values()) > 0


@pytest.mark.slow
def test_without_room_and_with_room_again(round_: Callable[[int], Round]) -> None:
    one = round_(list(METHODS).index(STOCK))
    finish(one, one.folder / "whole")
    found = Counter[str]()
    for form in ("full", "read-only"):
        counts, result = without_room(one, form)
        assert result == "clean"
        found += counts
    assert found["read-only refused"] == len(one.commands(one.folder, form="stages"))
    assert found["full refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cmoe", "flap"])
def test_the_same_inputs_give_the_same_digests(method: str, round_: Callable[[int], Round]) -> None:
    """Every stage and export, by commands and then by ``run``, each in a process of its own."""
    one = round_(list(METHODS).index(method))
    finish(one, one.folder / "whole", form="stages")
    found = repeated(one)
    assert {"calibrate", "partition", "router", "model", "finetune", "eval"} <= found.keys()
    assert len(found) == len(one.targets) + 6
    assert all(again for again, _ in found.values()), found


def test_the_page_counts(tmp_path: Path) -> None:
    found = attack.Found(rounds=Counter({"flap: run": 3}))
    found.add(
        attack.Found(
            inputs={"config.json": Counter(refused=2, accepted=1, KeyError=1)},
            flips={"model": Counter(refused=5, misnamed=1)},
            sent=Counter({"eval SIGKILL": 4, "export gguf SIGINT": 2}),
            repeats={"cmoe": {"eval": (True, False)}, "weave": {"eval": (True, True)}},
            wrong=["round 1: exit code 2"],
        )
    )
    text = " ".join(document(found, 2.0).split())
    for row in (
        "| config.json | 4 | 2 | 1 | 1 |",
        "| `flap` | 0 | 0 | 3 |",
        "for `cmoe`, `weave`.",
        "| `model` | 6 | 5 | 1 |",
        "| `export gguf` | 0 | 2 | 0 | 0 |",
        "| all | 4 | 2 | 0 | 0 |",
        "| `eval` | 2 of 2 | 1 of 2 |",
        "- round 1: exit code 2",
    ):
        assert row in text, text
