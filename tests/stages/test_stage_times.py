"""Times of stages to come: scaled from the nearest finished stage beside the run directory."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import run_config, run_stages

from weaver.config.loading import RunConfig
from weaver.models.checkpoint import Checkpoint
from weaver.stages.stage_times import LOAD_TOKENS, SPLIT_TOKENS, ExpectedTime, expected_times

TRAINING = {"steps": 2, "batch_size": 1, "sequence_length": 16, "eval_windows": 2}


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, every stage of which says that it took 100 seconds."""
    runs = tmp_path_factory.mktemp("times")
    run_stages(run_config(tiny_llama, finetune=TRAINING), runs / "first")
    for path in runs.rglob("manifest.json"):
        took(path, 100.0)
    return runs


def took(path: Path, seconds: float) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": seconds}))


def times(config: RunConfig, run_dir: Path) -> dict[str, ExpectedTime]:
    return expected_times(config, Checkpoint(config.model), run_dir)


def test_times_grow_with_the_work(finished: Path, tiny_llama: Path) -> None:
    config = run_config(tiny_llama, finetune=TRAINING)
    same = times(config, finished / "next")
    assert {time.seconds for time in same.values()} == {100.0}
    assert {time.source for time in same.values()} == {str(finished / "first")}
    assert "finetune" in same
    larger = times(
        run_config(
            tiny_llama,
            calibrate={"tokens": 1024},
            eval={"windows": 8},
            finetune={**TRAINING, "steps": 6},
        ),
        finished / "next",
    )
    # The backward pass of all 512, then of all 1,024 tokens: all of it doubles.
    assert larger["calibrate"].seconds == pytest.approx(200)
    assert larger["partition"].seconds == pytest.approx(
        100 * (1024 + SPLIT_TOKENS) / (512 + SPLIT_TOKENS)
    )
    assert larger["eval"].seconds == pytest.approx(100 * (512 + LOAD_TOKENS) / (256 + LOAD_TOKENS))
    assert larger["finetune"].seconds == pytest.approx(300)
    assert larger["bench"].seconds == pytest.approx(100)


def test_the_nearest_run_of_the_method_counts(finished: Path, tiny_llama: Path) -> None:
    config = run_config(tiny_llama, partition={"method": "flap", "num_experts": None})
    run_stages(config, finished / "second", calibration=finished / "first" / "calibrate")
    took(finished / "second" / "partition" / "manifest.json", 30.0)
    try:
        assert times(config, finished / "next")["partition"].seconds == 30.0
        assert times(run_config(tiny_llama), finished / "next")["partition"].seconds == 100.0
    finally:
        shutil.rmtree(finished / "second")


def test_a_part_of_a_stage_is_no_measure(finished: Path, tiny_llama: Path) -> None:
    request = finished / "first" / "partition" / "stage.json"
    before = request.stat().st_mtime
    os.utime(request, (before - 600, before - 600))
    try:
        found = times(run_config(tiny_llama), finished / "next")
    finally:
        os.utime(request, (before, before))
    assert "partition" not in found
    assert found["eval"].seconds == 100.0


def test_bench_keeps_to_its_budget(finished: Path, tiny_llama: Path) -> None:
    config = run_config(tiny_llama, bench={"repeats": 50, "seconds": 120.0})
    assert times(config, finished / "next")["bench"].seconds == 120.0


def test_what_only_the_text_says_is_not_guessed(finished: Path, tiny_llama: Path) -> None:
    config = run_config(tiny_llama, eval={"windows": None})
    assert "eval" not in times(config, finished / "next")
    assert "bench" in times(config, finished / "next")
