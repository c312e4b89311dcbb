"""What kernels depend on that is not in a model: this machine, and what is kept about it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cache_folder() -> Path:
    """Folder of what is made once per machine: ``$XDG_CACHE_HOME/weaver``, or ``~/.cache/weaver``.

    It may be deleted at any time; compiled kernels and measured costs are then made again.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weaver"


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Name of the processor as the system gives it; the architecture where it gives none."""
    names = _fields(cpuinfo, "model name")
    return next(filter(None, names), platform.processor() or platform.machine())


@cache
def cpu_features(cpuinfo: Path = CPUINFO) -> str:
    """Instruction sets of the processor, which decide what a native build may use."""
    return next(iter(_fields(cpuinfo, "flags") or _fields(cpuinfo, "Features")), "")


def _fields(cpuinfo: Path, name: str) -> list[str]:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
