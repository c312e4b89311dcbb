"""Predicted seconds by hand, and measurements that are made once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from weaver.artifacts.cache import cache_lock
from weaver.kernels import costs
from weaver.kernels.costs import TOKENS, Costs, LayerKind, Workload, costs_of, measure
from weaver.kernels.timing import Timing

FAMILY = LayerKind(8, 50, 10, torch.float32, "cpu", "torch", 1)
# At 1, 4, 16, 64 and 256 tokens.
COSTS = Costs(
    dense=(2.0, 2.0, 2.0, 8.0, 32.0),
    masked=(2.0, 2.0, 4.0, 10.0, 40.0),
    expert=(0.5, 0.5, 1.0, 2.0, 8.0),
    routing=(0.1, 0.1, 0.1, 0.1, 0.1),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WEAVER_CACHE", str(tmp_path))
    costs_of.cache_clear()
    yield
    costs_of.cache_clear()


def test_seconds_by_hand() -> None:
    # 10 shared neurons of 50, 16 tokens with two pairs each: 8 pairs for each of 4 experts.
    work = Workload(num_shared=10, num_experts=4, num_tokens=16, num_pairs=32)
    assert COSTS.seconds(work, FAMILY, "masked") == pytest.approx(4.0)
    # 4 * 10 / 50, and 4 experts of 8 tokens: a third of the way from 4 to 16, from 0.5 to 1.
    grouped = 4 * 0.2 + 4 * (0.5 + 0.5 / 3)
    assert COSTS.seconds(work, FAMILY, "grouped") == pytest.approx(grouped)
    assert COSTS.faster(work, FAMILY) == "grouped"
    # One token with three pairs uses three experts; one of four experts' pairs cannot be saved.
    assert COSTS.seconds(Workload(10, 4, 1, 3), FAMILY, "grouped") == pytest.approx(0.4 + 1.5)
    assert COSTS.faster(Workload(10, 4, 1, 3), FAMILY) == "grouped"
    assert COSTS.faster(Workload(10, 4, 1, 4), FAMILY) == "masked"
    # No pair at all: the shared neurons only.
    assert COSTS.seconds(Workload(10, 4, 1, 0), FAMILY, "grouped") == pytest.approx(0.4)


def test_seconds_between_and_beyond_what_was_measured() -> None:
    assert Costs.at(COSTS.masked, 40) == pytest.approx(7.0)
    assert Costs.at(COSTS.masked, 448) == pytest.approx(70.0)
    # Noise that makes more tokens cheaper is not carried on.
    assert Costs.at((1.0, 1.0, 1.0, 2.0, 1.5), 1000) == pytest.approx(1.5)


def test_a_busy_moment_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Timing((9.0, 1.0, 9.0))
    monkeypatch.setattr(costs, "interleave", lambda runs, **_: dict.fromkeys(runs, slow))
    found = measure(FAMILY)
    assert found.dense == found.masked == found.routing == (1.0,) * len(TOKENS)
    assert found.expert == (1 / 5,) * len(TOKENS)  # of five experts together


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def count(kind: LayerKind) -> Costs:
        measured.append(kind)
        return COSTS

    monkeypatch.setattr(costs, "measure", count)
    assert costs_of(FAMILY) == COSTS
    costs_of.cache_clear()  # Another process.
    assert costs_of(FAMILY) == COSTS
    assert measured == [FAMILY]
    assert json.loads(FAMILY.file.read_text())["expert"] == list(COSTS.expert)
    assert {path.name for path in FAMILY.file.parent.iterdir()} == {FAMILY.file.name, "costs.lock"}


def test_who_waits_goes_on_with_what_the_first_one_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(costs, "measure", lambda _family: pytest.fail("measured twice"))
    holding = threading.Event()

    def first() -> None:
        with cache_lock("costs"):
            holding.set()
            time.sleep(0.2)
            FAMILY.file.write_text(json.dumps(asdict(COSTS)))

    other = threading.Thread(target=first)
    other.start()
    holding.wait()
    assert costs_of(FAMILY) == COSTS
    other.join()


def _file(times: object) -> str:
    return json.dumps(dict.fromkeys(asdict(COSTS), times))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"dense": 1}', "[" * 99_999, _file("abcde"), _file([1.0] * 4)),
        *(_file([1.0, 1.0, 1.0, 1.0, "1"]), _file([-1.0] * 5), _file([float("nan")] * 5)),
    ],
    ids=range(11),
)
def test_a_damaged_file_is_measured_again(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(costs, "measure", lambda _family: COSTS)
    FAMILY.file.write_text(text)
    assert costs_of(FAMILY) == COSTS
    assert json.loads(FAMILY.file.read_text())["dense"] == list(COSTS.dense)


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WEAVER_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(costs, "measure", lambda _family: COSTS)
    assert costs_of(FAMILY) == COSTS
    (record,) = caplog.records
    assert "set WEAVER_CACHE to a folder that can be written" in record.getMessage()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 9},
        {"neurons": 60},
        {"width": 5},
        {"dtype": torch.bfloat16},
        {"backend": "native"},
        {"threads": 2},
    ],
)
def test_every_part_of_a_family_has_costs_of_its_own(change: dict[str, object]) -> None:
    assert FAMILY._replace(**change).file != FAMILY.file  # type: ignore[arg-type]


def test_a_measurement() -> None:
    """On a layer large enough that more work takes longer."""
    kind = LayerKind(128, 1024, 100, torch.float32, "cpu", "torch", torch.get_num_threads())
    found = measure(kind)
    for seconds in (found.dense, found.masked, found.expert, found.routing):
        assert len(seconds) == len(TOKENS)
        assert all(value > 0 for value in seconds)
    assert found.dense[-1] > 3 * found.dense[0]
    assert found.masked[-1] > 2 * found.expert[-1]
