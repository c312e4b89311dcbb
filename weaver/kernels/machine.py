"""Name, clock and instruction sets of the processor that the kernels run on."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """Name of the processor as the system gives it; the architecture where it gives none."""
    names = _fields(cpuinfo, "model name")
    return next(filter(None, names), platform.processor() or platform.machine())


def cpu_mhz(cpuinfo: Path = CPUINFO) -> float | None:
    """Clock of the first core at this moment, in MHz; None where the system does not say it."""
    clocks = _fields(cpuinfo, "cpu MHz")
    return float(clocks[0]) if clocks else None


@cache
def cpu_features(cpuinfo: Path = CPUINFO) -> str:
    """Instruction sets of the processor, which decide what a native build may use."""
    return next(iter(_fields(cpuinfo, "flags") or _fields(cpuinfo, "Features")), "")


def _fields(cpuinfo: Path, name: str) -> list[str]:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
