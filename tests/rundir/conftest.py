"""A finished run on the tiny model, and copies of it that a test may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import run_config, run_stages

from weaver.artifacts.manifest import MANIFEST, REQUEST


@pytest.fixture(scope="package")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests copy it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run_stages(run_config(tiny_llama), run_dir, until="assemble")
    return run_dir


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run whose records name the copy's folders."""
    shutil.copytree(source, target)
    for name in (REQUEST, MANIFEST):
        for record in target.glob(f"*/{name}"):
            record.write_text(record.read_text().replace(str(source), str(target)))
    return target


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A finished run of its own, below a folder whose name has a space."""
    return copy_run(finished, tmp_path / "my runs" / "run")
