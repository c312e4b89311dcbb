"""The folder of what is made once per machine and may be deleted at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """``$WEAVER_CACHE``, or ``~/.cache/weaver``."""
    return Path(os.environ.get("WEAVER_CACHE") or Path.home() / ".cache" / "weaver")


@contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Waits until no other process has the lock of that name in the cache folder; makes the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    # Released by the system when a process ends in whatever way.
    with FileLock(cache_folder() / f"{name}.lock"):
        yield
