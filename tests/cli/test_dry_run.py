"""``weaver run --dry-run``: says what would be done, and does nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tiny_runs import file_times, run_config, run_stages, run_values, write_config
from typer.testing import CliRunner

from weaver.cli.app import app
from weaver.config.loading import RunConfig, load_run_config
from weaver.config.sections import ModelConfig
from weaver.models.checkpoint import Checkpoint
from weaver.stages.estimate import estimate


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", run_values(tiny_llama))


@pytest.fixture(scope="module")
def half_finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the assembled model, with the last layers of its router missing."""
    run_dir = tmp_path_factory.mktemp("dry") / "run"
    run_stages(run_config(tiny_llama), run_dir, until="assemble")
    for name in ("manifest.json", "layer_003.safetensors"):
        (run_dir / "router" / name).unlink()
    return run_dir


def _dry_run(config: Path, run_dir: Path, *more: str) -> tuple[int, str]:
    arguments = ["run", str(config), "--run-dir", str(run_dir), "--dry-run", *more]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def _words(output: str) -> dict[str, str]:
    """Stage and what would happen to it, from the printed table."""
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    return {row[1]: row[2] for row in rows if len(row) > 3}


def test_a_fresh_directory_would_run_everything_and_is_not_made(
    config: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "fresh" / "run"
    before = file_times(tmp_path)

    code, output = _dry_run(config, run_dir)

    assert code == 0
    assert set(_words(output).values()) == {"run"}
    assert re.search(r"eval +│ run +│ +[\d.]+ MiB", output)
    assert file_times(tmp_path) == before
    assert not run_dir.parent.exists()


def test_what_is_not_free_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "warning:" not in _dry_run(config, tmp_path / "run")[1]
    needs = estimate(load_run_config(config), Checkpoint(load_run_config(config).model))
    free = needs["eval"].memory
    monkeypatch.setattr("weaver.stages.estimate.available_memory", lambda: free)
    _, output = _dry_run(config, tmp_path / "run")
    large = [stage for stage, each in needs.items() if each.memory > free]
    assert re.findall("warning: memory for (.*?):", output) == large
    usage = shutil.disk_usage(tmp_path)._replace(free=needs["calibrate"].disk)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    assert "warning: disk:" in _dry_run(config, tmp_path / "run")[1]


def test_a_half_finished_run_would_be_resumed(config: Path, half_finished: Path) -> None:
    before = file_times(half_finished)

    code, output = _dry_run(config, half_finished)

    assert code == 0
    assert _words(output) == {
        "calibrate": "skip",
        "partition": "skip",
        "build-router": "resume",
        "assemble": "run",
        "eval": "run",
        "bench": "run",
    }
    assert file_times(half_finished) == before


def test_a_refused_run_exits_1_and_names_the_keys(config: Path, half_finished: Path) -> None:
    before = file_times(half_finished)

    code, output = _dry_run(config, half_finished, "--set", "partition.sparsity=0.5")

    assert code == 1
    words = _words(output)
    assert (words["calibrate"], words["partition"], words["bench"]) == ("skip", "refuse", "refuse")
    assert "sparsity: 0.25 on disk, 0.5 asked for" in " ".join(output.split())
    assert file_times(half_finished) == before


def test_a_single_stage_says_it_too(half_finished: Path) -> None:
    for stage, said in (("build-router", "would resume"), ("assemble", "no finished build-router")):
        arguments = [stage, "--run-dir", str(half_finished), "--dry-run"]
        result = CliRunner().invoke(app, arguments)
        assert said in result.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimates_of_disk_are_near_what_is_written(
    dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_llama, calibrate={"tokens": 4096}, assemble={"dtype": dtype})
    run_stages(config, tmp_path, until="assemble")

    needs = estimate(config, Checkpoint(ModelConfig(path=str(tiny_llama))))

    weights = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert needs["assemble"].disk == pytest.approx(weights, rel=0.2)
    profiles = [*tmp_path.glob("calibrate/layer_*"), *tmp_path.glob("partition/profile/*")]
    written = sum(path.stat().st_size for path in profiles)
    kept = sum(needs[stage].disk for stage in ("calibrate", "partition"))
    assert kept == pytest.approx(written, rel=0.5)


def test_the_estimate_counts_what_a_refit_writes(tiny_llama: Path, tmp_path: Path) -> None:
    plain = run_config(tiny_llama, partition={"method": "weave"}, router={"refit": False})
    refit = run_config(tiny_llama, partition={"method": "weave"})
    run_stages(refit, tmp_path, until="build-router")

    checkpoint = Checkpoint(ModelConfig(path=str(tiny_llama)))
    extra = _disk(refit, checkpoint) - _disk(plain, checkpoint)

    written = [path.stat().st_size for path in tmp_path.rglob("compensation/*.safetensors")]
    assert extra == pytest.approx(sum(written), rel=0.1)


def _disk(config: RunConfig, checkpoint: Checkpoint) -> int:
    return sum(needs.disk for needs in estimate(config, checkpoint).values())
