"""How much memory is left, by what Linux says."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaver.conversion.memory import available_memory

GIB = 2**30


def machine(root: Path, **limits: str) -> Path:
    """A root folder with 8 GiB available, and a control group."""
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text(
        "MemTotal:       16777216 kB\nMemFree:         1048576 kB\n"
        "MemAvailable:    8388608 kB\nHugePages_Total:       0\n"
    )
    group = root / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in limits.items():
        (group / f"memory.{name}").write_text(text)
    return root


@pytest.mark.parametrize(
    ("limits", "gib"),
    [
        ({}, 8),
        ({"max": "max\n", "current": f"{GIB}\n"}, 8),
        ({"max": f"{4 * GIB}\n", "current": f"{GIB}\n"}, 3),
        (
            {
                "max": f"{4 * GIB}\n",
                "current": f"{3 * GIB}\n",
                "stat": f"anon {GIB}\ninactive_file {2 * GIB}\n",
            },
            3,
        ),
        ({"max": f"{64 * GIB}\n", "current": f"{GIB}\n"}, 8),
        ({"max": f"{GIB}\n", "current": f"{2 * GIB}\n"}, 0),
    ],
    ids=["no-group", "no-limit", "limit", "files-can-go", "large-limit", "full"],
)
def test_the_smaller_of_machine_and_container(
    limits: dict[str, str], gib: int, tmp_path: Path
) -> None:
    assert available_memory(machine(tmp_path, **limits)) == gib * GIB


def test_elsewhere_the_whole_machine_counts(tmp_path: Path) -> None:
    assert 2**27 < available_memory(tmp_path) < 2**45
    assert available_memory() > 2**20
