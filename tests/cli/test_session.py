"""Commands that run stages print tables, JSON, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import read_results, run_config, run_stages, run_values, write_config
from typer.testing import CliRunner, Result

from weaver.artifacts.manifest import read_manifest
from weaver.cli.app import app
from weaver.cli.session import Output

STAGES = ["calibrate", "partition", "build-router", "assemble", "eval", "bench"]


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("session") / "run"
    run_stages(run_config(tiny_llama), run_dir)
    return run_dir


def _weaver(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def test_a_stage_as_json(finished: Path) -> None:
    command = ("eval", "--run-dir", finished, "--sequence-length", "32", "--windows", "3")
    first = _weaver(*command, "--json", "--force")
    row = json.loads(first.stdout)
    manifest = read_manifest(finished / "eval", rebuild="")
    assert (row["stage"], row["digest"]) == ("eval", manifest.digest)
    assert row["summary"] == manifest.summary
    assert row["summary"]["kl"] == read_results(finished)["kl"]

    again = _weaver(*command, "--json")
    assert json.loads(again.stdout) == row
    assert "eval: complete, skipped" in again.stderr

    would = _weaver(*command, "--json", "--dry-run")
    assert json.loads(would.stdout) == {"stage": "eval", "would": "skip"}


def test_quiet_prints_nothing(finished: Path) -> None:
    command = ("eval", "--run-dir", finished, "--sequence-length", "64", "--windows", "1")
    result = _weaver(*command, "--force", "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_a_run_as_json(finished: Path, tiny_llama: Path, tmp_path: Path) -> None:
    values = run_values(tiny_llama)
    config = write_config(tmp_path / "run.yaml", values)
    run_dir = tmp_path / "run"

    planned = json.loads(_weaver("run", config, "-r", run_dir, "--dry-run", "--json").stdout)
    assert [stage["stage"] for stage in planned["stages"]] == STAGES
    assert planned["needs"]["assemble"]["disk"] > 0

    rows = json.loads(_weaver("run", config, "-r", run_dir, "--json").stdout)
    assert [row["stage"] for row in rows] == STAGES
    inspected = json.loads(_weaver("inspect", run_dir, "--json").stdout)
    assert [row["digest"] for row in rows] == [row["digest"] for row in inspected]


def test_a_skipped_stage_says_so(finished: Path) -> None:
    result = _weaver("assemble", "--run-dir", finished, "--no-smoke-test")
    assert "assemble: complete, skipped" in result.stdout


def test_warnings_stay_without_tables(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(finished / "model", rebuild="")
    tested = {
        **{"tokens": 282, "kl": 9.0, "not_finite": 0, "dense_not_finite": 0},
        **{"repetition": 0.9, "dense_repetition": 0.1, "degenerate": ["it repeats itself"]},
    }
    odd = manifest.model_copy(update={"summary": manifest.summary | {"smoke_test": tested}})
    for output in (Output(quiet=True), Output(as_json=True)):
        output.stage("assemble", manifest, finished / "model")
        assert capsys.readouterr() == ("", "")
        output.stage("assemble", odd, finished / "model")
        out, err = capsys.readouterr()
        assert out == ""
        assert "warning: degenerate: it repeats itself" in err
