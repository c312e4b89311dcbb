"""Curves reach a tracker, and a tracker that cannot be used says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from weaver.errors import WeaverError
from weaver.report.tracking import tracking


def events(folder: Path) -> list[Event]:
    """All events below a folder. A record is 8 bytes of length, 4 of checksum, data, 4 more."""
    found: list[Event] = []
    for path in sorted(folder.rglob("events.out.*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            found.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += length + 16
    return found


def test_curves_of_a_run(tmp_path: Path) -> None:
    settings = {"steps": 2, "phases": [{"trainable": "all"}], "patience": None}
    with tracking("tensorboard", "run", tmp_path / "logs", settings) as log:
        log({"loss": 2.5, "idle_experts": 0.25}, 1)
        log({"loss": 2.0}, 2)
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "logs" / "run")
        for value in event.summary.value
        if value.HasField("simple_value")
    ]
    assert scalars == [(1, "loss", 2.5), (1, "idle_experts", 0.25), (2, "loss", 2.0)]
    written = next((tmp_path / "logs").rglob("hparams.yml")).read_text()
    assert json.dumps(settings["phases"]) in written


def test_no_tracker_leaves_nothing(tmp_path: Path) -> None:
    with tracking(None, "run", tmp_path / "logs", {}) as log:
        log({"loss": 2.5}, 1)
    assert not (tmp_path / "logs").exists()


def test_unusable_trackers_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(WeaverError, match="no tracker is called tensorbord") as error,
        tracking("tensorbord", "run", tmp_path, {}),
    ):
        pass
    assert "tensorboard, trackio, wandb" in error.value.why
    with (
        pytest.raises(WeaverError, match="the tracker wandb is not installed") as error,
        tracking("wandb", "run", tmp_path, {}),
    ):
        pass
    assert error.value.fix == "pip install wandb"
