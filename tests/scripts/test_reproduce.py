"""``make reproduce``: tables of pages from sweeps, and the sweeps and pages that are there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import reproduce
import texts
import torch
from tiny_runs import file_times, run_values, write_config

from weaver.artifacts.store import file_digest
from weaver.config.sweeping import load_sweep
from weaver.evaluation.bootstrap import paired_bootstrap
from weaver.rundir.measurements import read_eval
from weaver.stages.sweep import cells_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "reproduce.py"
PAGE = "# Page\n\nBefore.\n\n<!-- table quality of small -->\n\n| old |\n\n<!-- end -->\n\nAfter.\n"
BLOCKS = [
    (page.name, *match.groups()[1:3])
    for page in reproduce.pages(ROOT / "docs")
    for match in reproduce.BLOCK.finditer(page.read_text())
]


@pytest.fixture
def clone(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a page and the sweep of its table, and the process in it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "docs" / "other.md").write_text("No table.\n")
    write_sweep(tmp_path, tiny_llama, ["random", "flap"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_sweep(clone: Path, model: Path, methods: list[Any]) -> None:
    folder = clone / "configs" / "sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    values = run_values(model)
    del values["partition"]
    sweep = {"bench": False, "methods": methods, "sparsities": [0.25]}
    write_config(folder / "small.yaml", {**values, "sweep": sweep})


def run() -> int:
    return reproduce.main(["--data-dir", "nowhere"])


def kept(folder: Path) -> dict[str, int]:
    return {name: time for name, time in file_times(folder).items() if name != ".lock"}


def test_a_table_is_what_was_measured(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = clone / "docs" / "page.md"
    assert run() == 0
    text = page.read_text()
    assert text.startswith(
        "# Page\n\nBefore.\n\n<!-- table quality of small -->\n\nCalibration: 512 "
    )
    assert text.endswith("|\n\n<!-- end -->\n\nAfter.\n")
    assert "old" not in text
    runs = clone / "runs" / "reproduce" / "small"
    random, flap = (read_eval(runs / f"{name}-0.25") for name in ("random", "flap"))
    (row,) = [line for line in text.splitlines() if line.startswith("| flap ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    difference, *_ = paired_bootstrap(
        flap.windows.kl, random.windows.kl, torch.Generator().manual_seed(0)
    )
    assert cells[2].startswith(f"{flap.kl:.3f} (")
    assert cells[3].startswith(f"{difference:+.3f} (")
    assert float(cells[5]) == pytest.approx(flap.moe.perplexity, rel=1e-3)
    # What is up to date is left alone.
    times = (page.stat().st_mtime_ns, kept(runs / "flap-0.25"))
    capsys.readouterr()
    assert run() == 0
    assert (page.stat().st_mtime_ns, kept(runs / "flap-0.25")) == times
    assert "small: 2 of 2 conversions are measured" in (out := capsys.readouterr().out)
    assert "docs/page.md: up to date" in out
    # What is missing is made again, to the same numbers, and nothing else is.
    shutil.rmtree(runs / "random-0.25" / "eval")
    assert run() == 0
    assert (page.read_text(), kept(runs / "flap-0.25")) == (text, times[1])


def test_a_page_with_a_failed_conversion_stays(
    clone: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 64 neurons do not divide by 7, with a width that leaves nothing over.
    bad = {"name": "bad", "sections": {"partition": {"method": "cmoe", "num_experts": 7}}}
    write_sweep(clone, tiny_llama, ["random", bad])
    assert run() == 1
    assert (clone / "docs" / "page.md").read_text() == PAGE
    assert "docs/page.md: failed: ['small']" in capsys.readouterr().out


def test_a_killed_reproduction_goes_on(clone: Path) -> None:
    runs = clone / "runs" / "reproduce" / "small"
    first = runs / "random-0.25" / "eval" / "manifest.json"
    command = [sys.executable, str(SCRIPT), "--data-dir", "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not first.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert (clone / "docs" / "page.md").read_text() == PAGE
    times = kept(first.parent)
    assert run() == 0
    assert kept(first.parent) == times
    assert "| flap " in (clone / "docs" / "page.md").read_text()


def test_the_pages_name_tables_and_sweeps_that_are_there() -> None:
    sweeps = {path.stem: cells_of(load_sweep(path)) for path in sweep_files()}
    assert {sweep for _, _, sweep in BLOCKS} == set(sweeps)
    assert {table for _, table, _ in BLOCKS} == set(reproduce.TABLES)
    assert set(texts.TEXTS) <= set(sweeps)
    assert all(cells for cells in sweeps.values())


def sweep_files() -> list[Path]:
    return sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("page", ["results.md", "tasks.md", "recovery.md", "headline.md"])
def test_the_rows_of_a_page_are_conversions_of_its_sweeps(page: str) -> None:
    """Labels in the page are those that the sweep's methods give; "before" marks older rows."""
    for match in reproduce.BLOCK.finditer((ROOT / "docs" / page).read_text()):
        cells = cells_of(load_sweep(ROOT / "configs" / "sweeps" / f"{match[3]}.yaml"))
        names = {cell.method.replace("__", ", ").replace("_", " ") for cell in cells}
        lines = [line for line in match[0].splitlines() if re.match(r"\| .*\d%? \|", line)]
        shown = [line.split("|")[1].strip() for line in lines]
        labels = {label.removesuffix(", before").partition(", seed")[0] for label in shown}
        assert labels <= names | {"dense"}, match[3]


def test_texts(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "wikitext2").mkdir(parents=True)
    (data / "domains").mkdir()
    for split in ("valid", "test"):
        (data / f"wikitext2/tok.{split}.txt").write_text("".join(f"{i}\n" for i in range(40)))
    rows = "".join(f'{{"text": "{str(i) * 3000}"}}\n' for i in range(5))
    (data / "domains/a.jsonl").write_text(rows)
    for write in (texts.write_wikitext, texts.split_wikitext, texts.split_domains):
        write(data, tmp_path)
    assert (tmp_path / "wikitext2_test.jsonl").read_text().count("\n") == 1
    assert (tmp_path / "wikitext2_held_out.txt").read_text() == "38\n39\n"
    assert (tmp_path / "wikitext2_train.txt").read_text().endswith("37\n")
    # The last two documents are the fewest that hold 4,500 characters.
    assert (tmp_path / "domains/a.jsonl").read_text() == "".join(rows.splitlines(True)[:3])
    before = file_digest(tmp_path / "domains_held_out.jsonl")
    texts.split_domains(data, tmp_path)
    assert file_digest(tmp_path / "domains_held_out.jsonl") == before
