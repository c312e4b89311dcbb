"""Progress on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from weaver.report import progress as module
from weaver.report.progress import stage_progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    value = Clock()
    monkeypatch.setattr(module, "time", value)
    return value


def log_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=False, width=40), stream


def test_log_lines_are_sparse_and_say_what_remains(clock: Clock) -> None:
    console, stream = log_console()
    with stage_progress(console)("calibrate", total=10) as advance:
        for layer in range(10):
            clock.now += 4
            advance(f"layer {layer}")
    # 4 s per layer: a line after layer 2 (12 s), 5 (24 s) and 8 (36 s), and the last one.
    assert stream.getvalue().splitlines() == [
        "calibrate: 3/10 (layer 2), 12.0 s elapsed, about 28.0 s remaining",
        "calibrate: 6/10 (layer 5), 24.0 s elapsed, about 16.0 s remaining",
        "calibrate: 9/10 (layer 8), 36.0 s elapsed, about 4.0 s remaining",
        "calibrate: 10/10 done in 40.0 s",
    ]


def test_a_resumed_stage_counts_only_its_own_time(clock: Clock) -> None:
    console, stream = log_console()
    with stage_progress(console)("partition", total=10, done=6) as advance:
        clock.now += 20
        advance("layer [6]")
        clock.now += 3
    assert stream.getvalue().splitlines() == [
        "partition: 7/10 (layer [6]), 20.0 s elapsed, about 1 min 00 s remaining",
        "partition: 7/10 done in 23.0 s",
    ]


def test_an_error_passes_and_claims_nothing(clock: Clock) -> None:
    console, stream = log_console()

    def stage() -> None:
        with stage_progress(console)("calibrate", total=3) as advance:
            clock.now += 1
            advance("layer 0")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        stage()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with stage_progress(console)("calibrate", total=3, done=1) as advance:
        advance("layer 1")
        advance("layer 2")
    text = stream.getvalue()
    assert "calibrate" in text
    assert "3/3" in text
    assert "done in" not in text


def test_a_bar_shows_names_as_they_are() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with stage_progress(console)("eval [dense]", total=1) as advance:
        advance("window 0")
    assert "eval [dense]" in stream.getvalue()


def test_standard_error_is_the_default() -> None:
    assert stage_progress().console.stderr
