"""No escape sequence out of a file reaches a terminal."""

from __future__ import annotations

import io

from weaver.report.progress import stage_progress
from weaver.report.tables import console_table
from weaver.report.terminal import make_console, printable

HOSTILE = "a\x1b]0;title\x07\x1b[2Jb\x9b1Ac\rd\u202ee"


def test_control_characters_are_written_out() -> None:
    shown = r"a\x1b]0;title\x07\x1b[2Jb\x9b1Ac\x0dd\u202ee"
    assert printable(HOSTILE) == shown
    assert printable("tab\tline\né") == "tab\tline\né"


def test_consoles_write_them_out_in_lines_tables_and_progress() -> None:
    for terminal in (False, True):
        console = make_console(file=io.StringIO(), width=300, force_terminal=terminal)
        console.print(HOSTILE, markup=False)
        console.print(console_table(HOSTILE, ("one", HOSTILE), [("x", HOSTILE)]))
        with stage_progress(console)(HOSTILE, 1) as advance:
            advance(HOSTILE)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert r"\x1b[2Jb" in text
        for sequence in ("\x1b]0;", "\x1b[2Jb", "\x9b", "\u202e", "\x07"):
            assert sequence not in text, (terminal, sequence)
