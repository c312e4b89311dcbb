"""Consoles that print text from files as text: no escape sequence in a name moves the cursor."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.segment import Segment

# C0 without tab and line feed, DEL, C1, and marks that turn the direction of what follows.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
} | {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """The text with control characters written out, as a backslash and their code."""
    return text.translate(_CONTROLS)


class _Printable:
    """Something printed, with the control characters of its text written out."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


class _PrintableHook:
    """rich's hook for everything that a console prints."""

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [_Printable(each) for each in renderables]


def make_console(**options: Any) -> Console:
    """A console, with the options of ``rich.console.Console``."""
    console = Console(**options)
    console.push_render_hook(_PrintableHook())  # type: ignore[arg-type]
    return console


def plain_line(text: str) -> str:
    """A text as one line of Markdown without markup: for names and values out of files."""
    line = " ".join(printable(text).split())
    return "".join(f"\\{each}" if each in _MARKUP else _ENTITIES.get(each, each) for each in line)


_MARKUP = frozenset("`*[]\\")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
