"""The three lines of an error, and packages that only an extra installs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weaver.data.sources import read_documents
from weaver.errors import WeaverError
from weaver.models.gguf import dequantise


def test_what_why_and_fix_stand_on_three_lines() -> None:
    error = WeaverError("runs/q: 3 of 4 layers", why="it was stopped", fix="weaver partition")
    assert str(error) == "runs/q: 3 of 4 layers\n  why: it was stopped\n  fix: weaver partition"
    assert (error.what, error.why, error.fix) == (
        "runs/q: 3 of 4 layers",
        "it was stopped",
        "weaver partition",
    )
    assert error.args == ("runs/q: 3 of 4 layers",)


def _parquet(folder: Path) -> None:
    (folder / "rows.parquet").touch()
    read_documents(str(folder / "rows.parquet"), None)


def _hub(_folder: Path) -> None:
    read_documents("hf:owner/name", None)


def _gguf(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(b"GGUF")
    dequantise(folder / "model.gguf", folder / "out")


@pytest.mark.parametrize(
    ("package", "extra", "ask"),
    [("pyarrow", "data", _parquet), ("datasets", "data", _hub), ("gguf", "gguf", _gguf)],
)
def test_a_missing_package_names_its_extra(
    package: str,
    extra: str,
    ask: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WeaverError, match=f"needs the package {package}") as caught:
        ask(tmp_path)
    assert caught.value.fix == f"pip install 'weaver-moe[{extra}]'"
