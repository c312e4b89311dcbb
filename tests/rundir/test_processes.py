"""Fine-tuning in two processes equals fine-tuning in one.

torchrun starts one pair of them; the others have the variables that it sets, and are forked.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    finished,
    fork_weaver,
    run_config,
    run_stages,
    run_values,
    run_weaver,
    write_config,
)
from transformers import AutoModelForCausalLM

from weaver.config.loading import RunConfig, parse_config

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHORT = {"batch_size": 3, "sequence_length": 64, "warmup_steps": 1, "steps": 6}
GUARD = {"eval_windows": 2, "eval_sequence_length": 64, "evaluate_every": 3}
FINETUNE = {**SHORT, **GUARD, "objective": "distill", "learning_rate": 1e-3, "precision": "float32"}
# Adapters, then the routers alone, then every weight: what each leaves, the next one keeps.
PHASES: list[dict[str, Any]] = [
    {"trainable": "lora", "lora": {"rank": 2, "also": ["router", "norms"]}, "learning_rate": 1e-3},
    {"trainable": "router", "learning_rate": 1e-3},
    {"trainable": "all", "learning_rate": 2e-5},
]
PHASE = {"batch_size": 3, "sequence_length": 64, "warmup_steps": 1, "steps": 3}


@pytest.fixture
def runs(tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A configuration and two run directories with the same assembled model."""
    values = run_values(tiny_llama, finetune={**FINETUNE, "checkpoint_every": 2})
    first, second = tmp_path / "one", tmp_path / "two"
    run_stages(run_config(tiny_llama), first, until="assemble")
    shutil.copytree(first, second)
    return write_config(tmp_path / "run.yaml", values), first, second


def command(config: Path, run_dir: Path) -> list[str]:
    return ["finetune", "--config", str(config), "--run-dir", str(run_dir)]


def finetune(config: Path, run_dir: Path, *words: str) -> str:
    done = run_weaver(*command(config, run_dir), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_pair(run_dir: Path, *words: str) -> list[BaseProcess]:
    """Two processes of one training; what they print is in ``RUN_DIR.log`` and a number."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        fork_weaver(
            log_of(run_dir, rank),
            *words,
            threads=1,
            environment={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def log_of(run_dir: Path, rank: int) -> Path:
    return run_dir.with_suffix(f".log{rank}")


def finetune_in_two(config: Path, run_dir: Path, *words: str) -> str:
    """What two processes print together."""
    codes = [finished(each) for each in start_pair(run_dir, *command(config, run_dir), *words)]
    shown = "".join(log_of(run_dir, rank).read_text() for rank in range(2))
    assert codes == [0, 0], shown
    return shown


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "finetune" / "manifest.json").read_text())
    return dict(found["summary"])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(run_dir / "finetune" / "model")
    return dict(model.state_dict())


@pytest.mark.slow
def test_two_processes_are_one(runs: tuple[Path, Path, Path]) -> None:
    config, first, second = runs
    finetune(config, first)
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "weaver", *command(config, second)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out perplexity") == 3  # the other process says nothing
    assert len(set(summary(first)["losses"])) == 6
    assert_equal_within_rounding(first, second)

    together = summary(second)
    assert "held-out perplexity" not in finetune_in_two(config, second)
    assert summary(second) == together


@pytest.mark.slow
def test_divided_weights_are_whole_ones(
    runs: tuple[Path, Path, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    _, first, second = runs
    phases = [{**PHASE, "objective": "distill", **each} for each in PHASES]
    settings = {**GUARD, "best_by": "perplexity", "precision": "float32", "phases": phases}
    config = write_config(tmp_path / "phases.yaml", run_values(tiny_llama, finetune=settings))
    finetune(config, first)
    finetune_in_two(config, second, "--shard")
    assert len(summary(first)["losses"]) == 9
    assert summary(first)["best_step"] > 3  # of a phase that began with what another had trained
    assert_equal_within_rounding(first, second)


def assert_equal_within_rounding(first: Path, second: Path) -> None:
    alone, together = summary(first), summary(second)
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert together["best_step"] == alone["best_step"]
    for one, two in zip(alone["evaluations"], together["evaluations"], strict=True):
        assert two["kl"] == pytest.approx(one["kl"], rel=1e-4)
    expected, found = weights(first), weights(second)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_divided_routers_learn_as_whole_ones(tiny_llama: Path, tmp_path: Path) -> None:
    values = run_values(tiny_llama, partition={"weighting": "softmax"})
    first, second = tmp_path / "one", tmp_path / "two"
    run_stages(parse_config(RunConfig, values, source="test"), first, until="assemble")
    shutil.copytree(first, second)
    phases = [
        {**PHASE, "trainable": "router", "temperature": 2.0, "learning_rate": 1e-2},
        {**PHASE, "balance_loss": 1.0, "learning_rate": 1e-3},
    ]
    values["finetune"] = {**GUARD, "precision": "float32", "phases": phases}
    config = write_config(tmp_path / "phases.yaml", values)
    finetune(config, first)
    finetune_in_two(config, second, "--shard")
    assert len(set(summary(first)["losses"])) == 6
    assert_equal_within_rounding(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--shard",)], ids=["whole", "divided"])
def test_two_killed_processes_go_on(runs: tuple[Path, Path, Path], words: tuple[str, ...]) -> None:
    config, first, second = runs
    finetune_in_two(config, first, *words)
    pair = start_pair(second, *command(config, second), *words)
    checkpoints = second / "finetune" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*.safetensors")):
        assert pair[0].is_alive(), "the training ended before its first checkpoint was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for each in pair:
        each.kill()
    for each in pair:
        each.join()
    assert not (second / "finetune" / "manifest.json").exists()

    finetune_in_two(config, second, *words)
    assert summary(second)["resumed_from"] >= 2
    assert summary(second)["losses"] == summary(first)["losses"]
    expected, found = weights(first), weights(second)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_batch_smaller_than_the_processes(runs: tuple[Path, Path, Path]) -> None:
    config, first, _ = runs
    pair = start_pair(first, *command(config, first), "--set", "finetune.batch_size=1")
    assert [finished(each) for each in pair] == [1, 1]
    said = log_of(first, 0).read_text()
    assert "batch_size=1 for 2 processes" in said
    assert "--batch-size 2" in said
    assert log_of(first, 1).read_text() == ""
