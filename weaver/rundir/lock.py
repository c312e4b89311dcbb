"""One process at a time in a run directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weaver.artifacts.store import atomic_path, write_error
from weaver.errors import WeaverError


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, even if killed.

    Raises:
        WeaverError: another process works there, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(run_dir / ".writable") as probe:
            probe.touch()
        (run_dir / ".writable").unlink(missing_ok=True)
        handle = (run_dir / ".lock").open("a")
    except OSError as error:
        raise write_error(run_dir, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WeaverError(
                f"{run_dir}: another weaver process is at work here",
                why="two processes in one run directory would overwrite each other",
                fix="wait for it, or use another --run-dir",
            ) from error
        yield
