"""The wheel: what it holds works from an installed copy, the C++ kernel and the texts included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from native_kernel import require_native

ROOT = Path(__file__).parents[1]
TRY = """
import pathlib, torch, weaver
from weaver.data.sources import read_documents
from weaver.kernels.cpu import build
assert pathlib.Path(weaver.__file__).is_relative_to(pathlib.Path.cwd()), weaver.__file__
assert read_documents("builtin:calibration", None) and read_documents("builtin:held-out", None)
assert (pathlib.Path(weaver.__file__).parent / "py.typed").exists()
assert build.is_available()
print("works")
"""


@pytest.mark.slow
def test_a_wheel_works_where_the_sources_are_not(tmp_path: Path) -> None:
    require_native()
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "weaver", source / "weaver")
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [sys.executable, *build, "--wheel-dir", str(tmp_path), str(source)], check=True, text=True
    )
    (wheel,) = tmp_path.glob("weaver_moe-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)

    environment = os.environ | {
        "PYTHONPATH": str(installed),
        "WEAVER_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "works\n", done.stderr
    assert "weaver = weaver.cli.app:main" in next(installed.glob("*/entry_points.txt")).read_text()
