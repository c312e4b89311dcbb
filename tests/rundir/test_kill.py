"""Real processes, killed and interrupted at chosen moments; the rerun ends as if nothing was.

To stop a process right behind a write without a hook in the program, it runs in slices of about a
millisecond: while it is stopped, the test looks at the files and kills it or lets it go on.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from tiny_models import save_tiny_model
from tiny_runs import (
    file_times,
    finished,
    fork_weaver,
    run_values,
    run_weaver,
    stage_digests,
    write_config,
)

LAYERS = 8
SLICE_SECONDS = 0.001
DEADLINE_SECONDS = 120
Moment = Callable[[Path], bool]
SHORT = {"batch_size": 2, "sequence_length": 64, "warmup_steps": 1, "learning_rate": 0.001}


@pytest.fixture(scope="module", params=["cmoe", "weave"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose stages take long enough to be met inside."""
    folder = tmp_path_factory.mktemp("kill")
    save_tiny_model(
        "llama",
        folder / "model",
        byte_tokenizer(),
        num_hidden_layers=LAYERS,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    values = run_values(
        folder / "model",
        calibrate={"tokens": 2048, "sequence_length": 128},
        partition={"method": request.param, "sequential": True},
        finetune={
            "phases": [
                {**SHORT, "trainable": "router", "steps": 2, "learning_rate": 0.01},
                {**SHORT, "trainable": "lora", "objective": "distill", "steps": 4},
            ],
            "eval_windows": 2,
            "eval_sequence_length": 64,
            "evaluate_every": 2,
            "checkpoint_every": 3,
        },
    )
    return write_config(folder / "run.yaml", values)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    done = run_weaver("run", config, "--run-dir", run_dir)
    assert done.returncode == 0, done.stderr
    return stage_digests(run_dir)


def _written(stage: str, pattern: str) -> Moment:
    """The stage has written a file, but not its manifest."""
    return lambda run_dir: (
        any((run_dir / stage).glob(pattern)) and not (run_dir / stage / "manifest.json").exists()
    )


def _stop_at(pid: int, alive: Callable[[], bool], moment: Callable[[], bool], send: int) -> None:
    """Run a process in slices until the moment has come, then send it a signal."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while alive() and time.monotonic() < deadline:
        os.kill(pid, signal.SIGSTOP)
        if moment():
            os.kill(pid, send)
            os.kill(pid, signal.SIGCONT)
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(SLICE_SECONDS)
    raise AssertionError("the moment never came")


def _finished_layers(run_dir: Path) -> dict[str, int]:
    """Times of the files of every layer whose file in the stage's own folder, the last, is there.

    A layer that was interrupted between two of its files is made again as a whole.
    """
    times = file_times(run_dir)
    return {
        name: written
        for name, written in times.items()
        if Path(name).name.startswith("layer_")
        and f"{Path(name).parts[0]}/{Path(name).name}" in times
    }


# In the order of the stages, so that one run directory meets them one after the other.
KILLS: dict[str, Moment] = {
    "calibrate": _written("calibrate", "layer_001.safetensors"),
    "partition": _written("partition", "layer_001.safetensors"),
    "router": _written("router", "layer_001.safetensors"),
    "model": _written("model", "model.safetensors"),
    "finetune": _written("finetune", "checkpoints/step-*.safetensors"),
    "eval": _written("eval", "stage.json"),
}


def test_killed_at_every_stage_a_run_ends_with_the_digests_of_an_undisturbed_one(
    config: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    layers: dict[str, int] = {}
    for stage, moment in KILLS.items():
        process = fork_weaver(tmp_path / "log", "run", config, "--run-dir", run_dir)
        assert process.pid is not None
        _stop_at(process.pid, process.is_alive, partial(moment, run_dir), signal.SIGKILL)
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == -signal.SIGKILL
        times = file_times(run_dir)
        assert layers.items() <= times.items(), f"rewritten before the kill in {stage}"
        assert f"{stage}/manifest.json" not in times
        layers = _finished_layers(run_dir)
    assert sum(name.startswith("router/layer_") for name in layers) == LAYERS

    process = fork_weaver(tmp_path / "log", "run", config, "--run-dir", run_dir)
    process.join(DEADLINE_SECONDS)

    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert layers.items() <= file_times(run_dir).items()
    assert stage_digests(run_dir) == undisturbed
    assert not list(run_dir.rglob(".*tmp*"))
    assert not (run_dir / "finetune" / "checkpoints").exists()


def test_ctrl_c_says_how_to_go_on_and_keeps_the_finished_layers(
    config: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    errors = tmp_path / "errors"
    process = fork_weaver(tmp_path / "log", "run", config, "--run-dir", run_dir, errors=errors)
    assert process.pid is not None
    moment = partial(KILLS["partition"], run_dir)
    _stop_at(process.pid, process.is_alive, moment, signal.SIGINT)
    code, err = finished(process), errors.read_text()
    layers = _finished_layers(run_dir)

    again = fork_weaver(tmp_path / "log", "run", config, "--run-dir", run_dir)

    assert finished(again) == 0, (tmp_path / "log").read_text()
    assert code == 130
    assert [line.split(":")[0].strip() for line in err.strip().splitlines()[-3:]] == [
        "error",
        "why",
        "fix",
    ]
    assert "interrupted" in err
    assert "Traceback" not in err
    assert {"calibrate/layer_007.safetensors", "partition/layer_001.safetensors"} <= layers.keys()
    assert layers.items() <= file_times(run_dir).items()
    assert stage_digests(run_dir) == undisturbed


def test_killed_between_the_experts_of_a_layer(tmp_path: Path) -> None:
    """An expert that was written stays; the rest of its layer is made from the same inputs."""
    changes: dict[str, Any] = {"num_experts": 8, "intermediate_size": 128, "num_hidden_layers": 1}
    save_tiny_model("olmoe", tmp_path / "model", byte_tokenizer(), **changes)
    values = run_values(
        tmp_path / "model",
        calibrate={"tokens": 8192, "sequence_length": 128},
        partition={"method": "cmoe", "sequential": True},
    )
    config = write_config(tmp_path / "run.yaml", values)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(run_dir: Path) -> multiprocessing.process.BaseProcess:
        return fork_weaver(tmp_path / "log", "run", config, "--run-dir", run_dir)

    experts: dict[str, int] = {}
    for stage in ("calibrate", "partition"):
        process = start(killed)
        assert process.pid is not None
        moment = partial(_written(stage, "layer_002.safetensors"), killed)
        _stop_at(process.pid, process.is_alive, moment, signal.SIGKILL)
        process.join(DEADLINE_SECONDS)
        experts |= {
            name: written
            for name, written in file_times(killed).items()
            if name in {f"{stage}/layer_{number:03d}.safetensors" for number in range(3)}
        }
        assert not (killed / stage / "layer_007.safetensors").exists()
    assert len(experts) == 6
    for run_dir in (killed, whole):
        process = start(run_dir)
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert experts.items() <= file_times(killed).items()
    assert stage_digests(killed) == stage_digests(whole)
