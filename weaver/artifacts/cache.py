"""The folder of what is made once per machine and may be deleted at any time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """``$WEAVER_CACHE``, or ``~/.cache/weaver``."""
    return Path(os.environ.get("WEAVER_CACHE") or Path.home() / ".cache" / "weaver")


def make_private(folder: Path) -> None:
    """Make a folder that its owner alone may enter, whatever the umask; one that is there stays.

    Raises:
        OSError: it cannot be made.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)


def check_own(path: Path) -> None:
    """Check that nobody else can have written a file or folder whose content will be executed.

    Raises:
        PermissionError: it is a link, belongs to another user, or others may write it.
    """
    found = path.lstat()
    # Behind a sticky bit, as in /tmp, others cannot touch what is not theirs.
    shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} is a symbolic link")
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user")
    if found.st_mode & 0o022 and not shared:
        raise PermissionError(
            f"{path} can be written by others, mode {stat.filemode(found.st_mode)}"
        )


@contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Waits until no other process has the lock of that name in the cache folder; makes the folder.

    Raises:
        OSError: the folder cannot be written.
    """
    make_private(cache_folder())
    # Released by the system when a process ends in whatever way.
    with FileLock(cache_folder() / f"{name}.lock"):
        yield
