"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = "proc/meminfo"
_CGROUP = "sys/fs/cgroup"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be allocated before the system swaps or kills.

    Linux: ``min(MemAvailable, memory.max - memory.current + inactive_file)``, the second where a
    container has such a limit (version 2 of control groups); files that the kernel can drop count
    as free. Elsewhere the whole memory of the machine, since nothing says what is free.

    Args:
        root: where ``proc`` and ``sys`` are looked for.
    """
    fields = _fields(root / _MEMINFO)
    if "MemAvailable:" not in fields:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = fields["MemAvailable:"] * 1024
    limit, used = (_number(root / _CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return available
    droppable = _fields(root / _CGROUP / "memory.stat").get("inactive_file", 0)
    return max(0, min(available, limit - used + droppable))


def _fields(path: Path) -> dict[str, int]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) > 1}


def _number(path: Path) -> int | None:
    """The number in a file; None without the file, or where it says "max"."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
