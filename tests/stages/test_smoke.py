"""The smoke test at the end of ``assemble``: what it finds, when it is left out, what it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import add_to_stage, file_times, run_config, run_stages, stage_digests

from weaver.artifacts.manifest import StageManifest
from weaver.artifacts.results import SmokeResult
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import Compensation
from weaver.config.sections import AssembleConfig, ModelConfig
from weaver.evaluation.perplexity import compare
from weaver.evaluation.smoke import smoke_windows
from weaver.models.accounting import ModelAccount
from weaver.models.checkpoint import Checkpoint
from weaver.models.loading import load_model
from weaver.rundir.inputs import COMPENSATION_FOLDER
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext
from weaver.stages import smoke
from weaver.stages.assemble import assemble
from weaver.stages.smoke import memory_needed


@pytest.fixture(scope="module")
def routed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to build-router; tests copy it."""
    run_dir = tmp_path_factory.mktemp("smoke") / "run"
    config = run_config(tiny_llama, partition={"method": "weave", "sparsity": 0.125})
    run_stages(config, run_dir, until="build-router")
    return run_dir


@pytest.fixture
def run_dir(routed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed, tmp_path / "run"))


def assembled(run_dir: Path, **values: Any) -> StageManifest:
    return assemble(StageContext(run_dir), AssembleConfig(**values))


def test_it_is_the_default_and_measures_the_model_that_was_written(
    run_dir: Path, tiny_llama: Path
) -> None:
    steps: list[str] = []

    class Progress:
        def __init__(self, title: str, total: int) -> None:
            self.title = f"{title}/{total}"

        def __enter__(self) -> Any:
            return lambda note: steps.append(f"{self.title} {note}")

        def __exit__(self, *_error: object) -> None:
            pass

    summary = assemble(StageContext(run_dir, progress=Progress), AssembleConfig()).summary

    result = SmokeResult.model_validate(summary["smoke_test"])
    assert result.model_dump(mode="json") == summary["smoke_test"]
    assert steps[-2:] == ["smoke test/2 dense", "smoke test/2 converted"]
    dense = load_model(tiny_llama, torch.float32)
    converted = load_model(run_dir / "model", torch.float32)
    tokenizer = Checkpoint(ModelConfig(path=str(tiny_llama))).tokenizer()
    comparison = compare(dense, converted, smoke_windows(tokenizer))
    assert result.kl == pytest.approx(comparison.kl, abs=1e-4)
    assert result.tokens == comparison.tokens == 6 * 47
    assert result.kl is not None
    assert 0 < result.kl < 2
    assert result.degenerate == ()
    read = json.loads((run_dir / "model" / "manifest.json").read_text())
    assert read["summary"]["smoke_test"] == summary["smoke_test"]


def test_a_conversion_that_is_broken(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models are less sure than trained ones, so that less KL means as much."""
    monkeypatch.setattr("weaver.evaluation.smoke.KL_BOUND", 1.0)
    whole = Path(shutil.copytree(run_dir, tmp_path / "whole"))
    routers = run_dir / "router"
    paths = sorted((routers / COMPENSATION_FOLDER).iterdir())
    assert len(paths) == 4
    for path in paths:
        compensation = read_record(path, Compensation)
        assert compensation.down_FD is not None
        write_record(path, Compensation(down_FD=-20 * compensation.down_FD))
    add_to_stage(routers, paths)

    result = SmokeResult.model_validate(assembled(run_dir).summary["smoke_test"])

    assert result.kl is not None
    assert result.degenerate[0] == (
        f"KL to the dense model is {result.kl:.2f} nats per token, above 1"
    )
    assert assembled(whole).summary["smoke_test"]["degenerate"] == []


def test_weights_that_are_not_finite(run_dir: Path) -> None:
    path = layer_path(run_dir / "router" / COMPENSATION_FOLDER, 0)
    compensation = read_record(path, Compensation)
    assert compensation.down_FD is not None
    # Finite in float32, infinite in float16.
    write_record(path, Compensation(down_FD=1e6 * compensation.down_FD.sign()))
    add_to_stage(run_dir / "router", [path])

    tested = assembled(run_dir, dtype="float16").summary["smoke_test"]

    assert tested["kl"] is None
    assert tested["not_finite"] == 282
    assert tested["dense_not_finite"] == 0
    assert "logits of the converted model are not finite" in tested["degenerate"][0]


def test_it_is_no_part_of_what_is_written_and_compared(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    with_test, without = assembled(run_dir), assembled(other, smoke_test=False)

    assert without.summary["smoke_test"] is None
    assert with_test.request.config == without.request.config
    assert "smoke_test" not in with_test.request.config
    assert with_test.request.fingerprint == without.request.fingerprint
    assert stage_digests(run_dir) == stage_digests(other)
    recipe = json.loads((run_dir / "model" / "config.json").read_text())["weaver"]["recipe"]
    assert recipe["assemble"] == with_test.request.config
    # A finished stage is not tried again, and the other setting is no other configuration.
    before = file_times(other)
    assert assembled(other).summary == without.summary
    assert file_times(other) == before


def test_equal_runs_find_the_same(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    assert assembled(run_dir).summary == assembled(other).summary


def test_models_that_do_not_fit_are_not_loaded(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoke, "available_memory", lambda: 100_000)
    monkeypatch.setattr(smoke, "load_model", lambda *_: pytest.fail("loaded"))

    tested = assembled(run_dir).summary["smoke_test"]

    assert list(tested) == ["skipped"]
    assert "KiB, more memory than was available" in tested["skipped"]


def test_the_memory_it_needs() -> None:
    account = ModelAccount(
        hidden_size=32,
        intermediate_size=64,
        total_dense_parameters=1000,
        layers=[],
        dense_gate_bias=False,
        dense_up_bias=False,
        dense_output_bias=False,
    )
    larger = max(1000, account.total_parameters)
    assert memory_needed(account, torch.bfloat16, 0) == int(1.2 * 2 * larger)
    # Kept log-probabilities, and as much again for temporaries, in four bytes each.
    assert memory_needed(account, torch.float32, 500) == int(1.2 * (4 * larger + 2 * 4 * 500))
