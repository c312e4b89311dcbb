"""One process at a time in a run directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from weaver.artifacts.store import write_error
from weaver.errors import WeaverError, shell


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, even if killed.

    Raises:
        WeaverError: another process works there, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # One name, so that the next command removes what a killed one left.
        probe = run_dir / ".writable"
        probe.unlink(missing_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
        _check_no_link(run_dir / ".lock")
        lock = FileLock(run_dir / ".lock", blocking=False)
        lock.acquire()
    except Timeout as error:
        raise WeaverError(
            f"{run_dir}: another weaver process is at work here",
            why="two processes in one run directory would overwrite each other",
            fix="wait for it, or use another --run-dir",
        ) from error
    except OSError as error:
        raise write_error(run_dir, error) from error
    try:
        yield
    finally:
        lock.release()


def _check_no_link(path: Path) -> None:
    """Locking opens the file for writing: through a link that would be another one."""
    if path.is_symlink():
        raise WeaverError(
            f"{path}: is a symbolic link",
            why="weaver makes this file itself, and writes through no link",
            fix=shell("rm", path),
        )
