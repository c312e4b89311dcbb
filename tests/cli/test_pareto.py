"""``weaver pareto`` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import file_times, run_config, run_stages
from typer.testing import CliRunner, Result

import weaver.cli.app


@pytest.fixture
def calibrated(tiny_llama: Path, tmp_path: Path) -> Path:
    run_stages(run_config(tiny_llama), tmp_path / "run", until="calibrate")
    return tmp_path / "run"


def pareto(run_dir: Path, *flags: str) -> Result:
    words = ["pareto", "--run-dir", str(run_dir), *flags]
    return CliRunner().invoke(weaver.cli.app.app, words)


@pytest.mark.usefixtures("made_up_costs")
def test_the_table_is_printed_and_nothing_written(calibrated: Path) -> None:
    before = file_times(calibrated)

    result = pareto(calibrated, "--method", "random", "--sparsity", "0.1")

    assert result.exit_code == 0, result.output
    assert file_times(calibrated) == before
    assert {path.name for path in calibrated.iterdir()} == {".lock", "calibrate"}
    lines = [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines()]
    rows = [cells[1:-1] for cells in lines if len(cells) > 3]
    # 7 of 8, 14 of 16, 29 of 32 and 58 of 64 slices.
    assert [row[:4] for row in rows] == [
        ["8", "8", "56", "12.5%"],
        ["16", "4", "56", "12.5%"],
        ["32", "2", "58", "9.4%"],
        ["64", "1", "58", "9.4%"],
    ]
    # (3 * 56 + 8) / (3 * 64) of the FLOPs.
    assert rows[0][5] == "91.7%"
    # A router of 8, 16, 32, 64 rows at a tenth of a second each, beside the second of the FFN.
    assert [row[6] for row in rows] == ["0.56x", "0.38x", "0.24x", "0.14x"]
    assert [row[7] for row in rows] == [row[6] for row in rows]
    # The first one is the fastest, so that none can dominate it.
    assert rows[0][8] == "yes"
    assert "speed-up at 1 token" in result.stdout
    assert "speed-up at 512 tokens" in result.stdout
    assert "pareto: 64 experts" in result.stderr


def test_a_static_method_is_refused(calibrated: Path) -> None:
    result = pareto(calibrated, "--method", "flap")

    assert result.exit_code == 1
    assert "error: method flap is static" in result.stderr
