"""Runs side by side: paired differences, what cannot be paired, and the forms of the table."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import read_results, run_config, run_stages
from typer.testing import CliRunner, Result

from weaver.artifacts.compared_runs import Interval
from weaver.cli.app import app
from weaver.config.sections import EvalConfig
from weaver.evaluation.bootstrap import paired_bootstrap
from weaver.report.runs_table import runs_table
from weaver.rundir.stage_run import StageContext
from weaver.stages.compare import compare_runs
from weaver.stages.evaluate import evaluate

WINDOWS: dict[str, Any] = {"sequence_length": 32, "windows": 6}


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two methods, evaluated on one text and one task; the first one was timed."""
    folder = tmp_path_factory.mktemp("compare")
    task = folder / "quiz.jsonl"
    items = [
        {"query": f"{i} is", "choices": ["one", "a whale", "3"], "gold": i % 3} for i in range(12)
    ]
    task.write_text("\n".join(json.dumps(item) for item in items))
    found = []
    for method in ("cmoe", "random"):
        config = run_config(
            tiny_llama,
            partition={"method": method},
            eval={**WINDOWS, "tasks": [str(task)]},
        )
        run_stages(config, folder / method, until="bench" if method == "cmoe" else "eval")
        found.append(folder / method)
    return found[0], found[1]


def weaver(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *(str(word) for word in words)])


def test_differences_are_paired_with_the_first_run(runs: tuple[Path, Path]) -> None:
    first, second = compare_runs(runs)
    values = [read_results(run) for run in runs]
    pair = [each["windows"]["kl"] for each in reversed(values)]
    mean, low, high = paired_bootstrap(pair[0], pair[1], torch.Generator().manual_seed(0))

    assert first.kl_difference is None
    assert second.kl_difference == Interval(mean=mean, low=low, high=high)
    assert second.kl.mean - first.kl.mean == pytest.approx(mean)
    assert (first.method, second.method) == ("cmoe", "random")
    assert first.model_bytes == (runs[0] / "model" / "model.safetensors").stat().st_size

    hits = [values[i]["moe"]["tasks"] for i in (0, 1)]
    ((path, ours),) = hits[1].items()
    accuracy = second.tasks["quiz, acc_norm"].difference
    assert accuracy is not None
    expected = ours["metrics"]["acc_norm"] - hits[0][path]["metrics"]["acc_norm"]
    assert accuracy.mean == pytest.approx(expected)
    assert first.tasks["quiz, acc_norm"].difference is None


def test_another_text_has_no_difference(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(runs[1], tmp_path / "other"))
    evaluate(StageContext(other, force=True), EvalConfig(sequence_length=48, windows=6))
    _, found = compare_runs([runs[0], other])
    assert found.kl_difference is None
    assert found.tasks == {}


@pytest.mark.parametrize(
    ("low", "high", "excludes"), [(0.1, 0.2, True), (-0.2, -0.1, True), (-0.1, 0.1, False)]
)
def test_what_is_significant(low: float, high: float, excludes: bool) -> None:
    assert Interval(mean=(low + high) / 2, low=low, high=high).excludes_zero == excludes


def test_the_forms_say_the_same(runs: tuple[Path, Path]) -> None:
    found = compare_runs(runs)
    headers, rows = runs_table(found)
    cells = {row[0]: row[1:] for row in rows}
    assert headers == ["", str(runs[0]), str(runs[1])]
    assert cells["  less the first run's"][0] == ""
    assert cells["  less the first run's"][1].startswith(("+", "-"))
    assert found[0].device
    assert cells["timed on"] == (found[0].device, "")
    assert {f"speed-up, {phase}" for phase in found[0].speedups} <= cells.keys()
    assert found[0].speedups

    plain = weaver(*runs)
    assert plain.exit_code == 0, plain.output
    assert "* excludes 0" in plain.stdout
    assert json.loads(weaver(*runs, "--json").stdout)[1] == found[1].model_dump(mode="json")
    assert list(csv.reader(io.StringIO(weaver(*runs, "--csv").stdout))) == [
        headers,
        *(list(row) for row in rows),
    ]
    markdown = weaver(*runs, "--markdown").stdout
    assert cells["perplexity"][1] in markdown


def test_tables_for_other_programs_hold_no_escape_sequence(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run_dir = shutil.copytree(runs[0], tmp_path / "a\x1b[2Jb")
    for form in ("--markdown", "--csv"):
        text = weaver(run_dir, form).stdout
        assert "\x1b" not in text
        assert r"a\x1b[2Jb" in text


def test_refusals(runs: tuple[Path, Path], tmp_path: Path) -> None:
    both = weaver(*runs, "--json", "--csv")
    assert both.exit_code == 1
    assert "more than one of" in both.stderr
    missing = weaver(runs[0], tmp_path)
    assert missing.exit_code == 1
    assert f"weaver eval --run-dir {tmp_path}" in " ".join(missing.stderr.split())
