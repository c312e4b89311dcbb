"""Free disk: what a stage certainly writes has room, or nothing is computed or removed."""

from __future__ import annotations

import shutil
from pathlib import Path

from weaver.errors import WeaverError
from weaver.report.tables import format_bytes


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be made."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_disk(folder: Path, needed: int) -> None:
    """Check that a stage's folder has room to grow to a size.

    Args:
        folder: of the stage; what an interrupted one left in it is counted in.
        needed: bytes, no more than what the stage writes in any case.

    Raises:
        WeaverError: the disk has less.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_disk(folder)
    if needed > there + free:
        raise WeaverError(
            f"{folder}: {format_bytes(free)} of disk are free, {format_bytes(needed - there)} "
            "are needed",
            why="less would end in a full disk when most of the work is done",
            fix="free space, or choose a --run-dir on another disk, then rerun the same command",
        )
