"""The three lines of an error."""

from __future__ import annotations

from weaver.errors import WeaverError


def test_what_why_and_fix_stand_on_three_lines() -> None:
    error = WeaverError("runs/q: 3 of 4 layers", why="it was stopped", fix="weaver partition")
    assert str(error) == "runs/q: 3 of 4 layers\n  why: it was stopped\n  fix: weaver partition"
    assert (error.what, error.why, error.fix) == (
        "runs/q: 3 of 4 layers",
        "it was stopped",
        "weaver partition",
    )
    assert error.args == ("runs/q: 3 of 4 layers",)
