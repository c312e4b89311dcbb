"""Progress of a stage: a bar on a terminal, sparse lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from weaver.report.tables import format_seconds
from weaver.report.terminal import make_console, printable

# In a log, at most one line in this many seconds, and one at the end.
LOG_SECONDS = 10.0

Advance = Callable[[str], None]


@dataclass(frozen=True)
class StageProgress:
    """Makes the progress displays of a stage; see ``stage_progress``.

    Args:
        console: where to write.
    """

    console: Console

    def __call__(
        self, description: str, total: int, *, done: int = 0
    ) -> AbstractContextManager[Advance]:
        """A display that is open for the length of a ``with`` block.

        Args:
            description: what is being done, such as "calibrate".
            total: number of units.
            done: units that were finished before (a resumed stage).

        Returns:
            A context manager; its value is called once per finished unit with what was finished.
        """
        show = _bar if self.console.is_terminal else _lines
        return show(self.console, description, total, done)


def stage_progress(console: Console | None = None) -> StageProgress:
    """Progress displays on a console (standard error if none is given).

    Use::

        progress = stage_progress()
        with progress("calibrate", total=30) as advance:
            for layer in range(30):
                ...
                advance(f"layer {layer}")

    A terminal gets a bar with count, elapsed and remaining time. Anything else gets plain lines,
    one in 10 seconds at most, and one at the end of a block that was not left by an error.
    """
    return StageProgress(console or make_console(stderr=True))


@contextmanager
def _bar(console: Console, description: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # What is live goes around the console's hook.
    description = printable(description)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, completed=done)

        def advance(unit: str) -> None:
            progress.update(task, advance=1, description=printable(f"{description}: {unit}"))

        yield advance
        progress.update(task, description=description)


@contextmanager
def _lines(console: Console, description: str, total: int, done: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    finished = done

    def advance(unit: str) -> None:
        nonlocal finished, last
        finished += 1
        now = time.monotonic()
        if now - last < LOG_SECONDS or finished >= total:
            return
        last = now
        remaining = (now - start) / (finished - done) * (total - finished)
        _log(
            console,
            f"{description}: {finished}/{total} ({unit}), {format_seconds(now - start)} elapsed, "
            f"about {format_seconds(remaining)} remaining",
        )

    yield advance
    elapsed = format_seconds(time.monotonic() - start)
    _log(console, f"{description}: {finished}/{total} done in {elapsed}")


def _log(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
