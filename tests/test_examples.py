"""The examples run, on a tiny model in the place of the one that they name."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_script(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as a program."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_own_data(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("The ferry leaves at noon and comes back before the tide turns. " * 200)
    words = (str(tiny_llama), str(text), str(tmp_path / "run"), "--tokens", "2048")
    run_script("own_data.py", *words, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert said.startswith("KL ")
    assert "The river" in said


def test_sweep(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (str(tiny_llama), str(tmp_path), "--tokens", "2048", "--sparsities", "0.25", "0.5")
    run_script("sweep.py", *words, monkeypatch=monkeypatch)
    rows = capsys.readouterr().out.splitlines()[1:]
    sparsities, flops = ([row.split()[i] for row in rows] for i in (0, 1))
    assert sparsities == ["25.0%", "50.0%"]
    assert float(flops[0]) > float(flops[1])


def test_the_notebook(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code cells in order, with another model, folder and number of tokens."""
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    first, *others = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    names: dict[str, object] = {}
    exec(first, names)
    assert {"MODEL", "RUN", "TOKENS"} <= names.keys()
    names |= {"MODEL": str(tiny_llama), "RUN": str(tmp_path / "run"), "TOKENS": 2048}
    for source in others:
        exec(source, names)
    said = capsys.readouterr().out
    assert said.startswith("KL ")
    assert "The whale" in said
