"""``weaver eval`` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import read_results, run_config, run_stages, run_values, write_config
from typer.testing import CliRunner, Result

import weaver.cli.app
from weaver.artifacts.types import FIRST_TOKENS


@pytest.fixture
def assembled(tiny_llama: Path, tmp_path: Path) -> Path:
    run_stages(run_config(tiny_llama), tmp_path / "run", until="assemble")
    return tmp_path / "run"


def evaluate(run_dir: Path, *flags: str | Path) -> Result:
    words = ["eval", "--run-dir", run_dir, "--sequence-length", "64", "--windows", "2", *flags]
    return CliRunner().invoke(weaver.cli.app.app, [str(word) for word in words])


def test_the_router_flag_shows_and_writes_the_report(assembled: Path) -> None:
    result = evaluate(assembled, "--router")

    assert result.exit_code == 0, result.output
    report = read_results(assembled)["router"]
    assert report["tokens"] == 2 * (64 - FIRST_TOKENS)
    assert "router on 124 held-out tokens; cmoe on halves of" in result.output
    for header in ("oracle agreement", "captured contribution", "expert Jaccard"):
        assert header in result.output
    mean = next(line for line in result.output.splitlines() if " mean " in line)
    assert f"{100 * report['mean']['oracle_agreement']:.1f}%" in mean
    refused = evaluate(assembled)
    assert refused.exit_code == 1
    assert "router: " in refused.stderr


def test_the_flag_overrides_the_file(assembled: Path, tiny_llama: Path, tmp_path: Path) -> None:
    values = run_values(tiny_llama, eval={"router": True})
    path = write_config(tmp_path / "config.yaml", values)

    assert evaluate(assembled, "--config", path, "--no-router").exit_code == 0

    assert read_results(assembled)["router"] is None
