"""Sweeps: which cells there are, shared calibrations, failures, and going on."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny_runs import file_times, run_values, start_weaver, write_config
from typer.testing import CliRunner, Result

from weaver.cli.app import app
from weaver.config.sweeping import load_sweep
from weaver.errors import WeaverError
from weaver.stages.sweep import cells_of

GROUPED = {"calibrate": {"groups": True}, "partition": {"method": "dive"}}
# 64 neurons do not divide by 7, with a width that leaves nothing over.
BAD = {"method": "cmoe", "num_experts": 7}


def sweep_file(model: Path, path: Path, **sweep: Any) -> Path:
    values = run_values(model)
    del values["partition"]
    return write_config(path, {**values, "sweep": {"bench": False, **sweep}})


def names(path: Path) -> list[str]:
    return [cell.name for cell in cells_of(load_sweep(path))]


def test_the_cells_are_all_combinations(tiny_llama: Path, tmp_path: Path) -> None:
    path = sweep_file(
        tiny_llama,
        tmp_path / "sweep.yaml",
        methods=[
            "cmoe",
            "flap",
            {
                "name": "grouped",
                "sections": {"calibrate": {"groups": True}, "partition": {"method": "dive"}},
            },
        ],
        sparsities=[0.25, 0.5],
        num_experts=[None, 16],
        seeds=[0, 3],
    )
    cells = cells_of(load_sweep(path, ["sweep.sparsities=[0.25]"]))
    # A static method has no slices to vary.
    assert [cell.name for cell in cells[:5]] == [
        "cmoe-0.25-seed0",
        "cmoe-0.25-16slices-seed0",
        "flap-0.25-seed0",
        "grouped-0.25-seed0",
        "grouped-0.25-16slices-seed0",
    ]
    assert len(cells) == 10
    assert len(names(path)) == 20
    assert {cell.calibration for cell in cells[:3]} == {"calibration-seed0"}
    own = {cell.calibration for cell in cells[3:5]}
    assert len(own) == 1
    assert own.pop().startswith("calibration-seed0-")
    assert cells[1].config.partition.num_experts == 16
    assert cells[3].config.partition.method == "dive"
    assert cells[5].config.seed == 3


def test_a_sparsity_of_its_own_takes_the_place_of_the_others(
    tiny_llama: Path, tmp_path: Path
) -> None:
    own = {"name": "less", "sections": {"partition": {"method": "cmoe", "sparsity": 0.375}}}
    path = sweep_file(tiny_llama, tmp_path / "sweep.yaml", methods=["cmoe", own])
    cells = cells_of(load_sweep(path))
    assert [cell.name for cell in cells] == ["cmoe-0.25", "cmoe-0.5", "less-0.375"]
    assert cells[-1].method == "less"
    assert cells[-1].config.partition.sparsity == 0.375


def test_refusals(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    with pytest.raises(WeaverError, match=r"two cells are called weave-0\.25"):
        names(sweep_file(tiny_llama, path, methods=["weave", "weave"], sparsities=[0.25]))
    with pytest.raises(WeaverError, match="sparsities"):
        load_sweep(sweep_file(tiny_llama, path, sparsities=[1.5]))
    with pytest.raises(WeaverError, match="method"):
        names(sweep_file(tiny_llama, path, methods=["weaves"]))
    with pytest.raises(WeaverError, match="no section sweep"):
        load_sweep(write_config(path, run_values(tiny_llama)))


def weaver(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, words)])


def test_a_failed_cell_stops_no_other_and_is_tried_again(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = sweep_file(
        tiny_llama,
        tmp_path / "sweep.yaml",
        methods=[
            {"name": "bad", "sections": {"partition": {"method": "cmoe", "num_experts": 7}}},
            "random",
            "flap",
        ],
        sparsities=[0.25],
    )
    first = weaver(path, out)
    assert first.exit_code == 1
    assert "1 cells failed: bad-0.25" in first.stderr
    assert "7" in first.stderr
    assert "2/3 random-0.25: KL" in first.stdout
    assert "error:" in (out / "logs" / "bad-0.25.log").read_text()
    comparison = (out / "comparison.md").read_text()
    assert "random-0.25" in comparison
    assert "- bad-0.25: " in comparison
    page = (out / "report.html").read_text()
    assert "Settings of calibrate, flap-0.25" in page
    # One calibration for all: no cell has its own.
    assert {each.name for each in out.iterdir() if (each / "calibrate").is_dir()} == {
        "calibration-seed0"
    }

    def kept() -> dict[str, int]:
        folders = ("calibration-seed0", "random-0.25", "flap-0.25")
        times = {name: file_times(out / name) for name in folders}
        return {
            f"{name}/{path}": time
            for name, found in times.items()
            for path, time in found.items()
            if path != ".lock"
        }

    before = kept()
    mended = weaver(path, out, "--set", "sweep.methods=[cmoe, random, flap]")
    assert mended.exit_code == 0, mended.output
    assert kept() == before
    assert "cmoe-0.25" in (out / "comparison.md").read_text()
    assert "Failed" not in (out / "comparison.md").read_text()


def test_a_cell_ends_with_a_sweep_that_is_killed(tiny_llama: Path, tmp_path: Path) -> None:
    training = {"steps": 20_000, "batch_size": 1, "sequence_length": 64, "eval_windows": 2}
    method = {"name": "long", "sections": {"partition": {"method": "cmoe"}, "finetune": training}}
    path = sweep_file(tiny_llama, tmp_path / "sweep.yaml", methods=[method], sparsities=[0.25])
    run_dir = tmp_path / "out" / "long-0.25"
    with start_weaver("sweep", path, tmp_path / "out") as process:
        while process.poll() is None and not (run_dir / "finetune").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    # The lock goes with the process that holds it; minutes of training are left.
    with FileLock(run_dir / ".lock").acquire(timeout=60):
        assert not (run_dir / "finetune" / "manifest.json").exists()
