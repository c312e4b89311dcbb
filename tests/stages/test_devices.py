"""Every stage names the device of what it makes, which a machine without a GPU can prove.

With ``meta`` as the default device a tensor that names none has no values: the first operation that
reads it, or mixes it with others, fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import file_times, run_config, run_stages

from weaver.artifacts.manifest import read_manifest, write_manifest
from weaver.evaluation.generation import Decoding
from weaver.stages.generate import generate

GROUPS: dict[str, Any] = {"groups": True, "tokens": 1000}
TUNED: dict[str, Any] = {
    **{"precision": "float32", "evaluate_every": 1},
    **{"eval_data": ["builtin:held-out"], "eval_windows": 2, "eval_sequence_length": 64},
    "phases": [{"steps": 2, "trainable": "all", "batch_size": 2, "sequence_length": 64}],
}

# Sizes of kernels are timed on data of their own, which is no part of a stage.
pytestmark = pytest.mark.usefixtures("made_up_costs")


@contextmanager
def nothing_without_a_device() -> Iterator[None]:
    """Whatever names no device is made on ``meta``."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "partition",
    [
        {"method": "weave"},
        {"method": "weave", "allocation": "fisher"},
        {"method": "weave", "options": {"selection": "top-k"}},
        {"method": "cmoe"},
        {"method": "expertweaver"},
        {"method": "dive", "num_experts": 4},
        {"method": "random"},
        {"method": "weight-kmeans"},
        {"method": "flap", "num_experts": None, "allocation": "adaptive"},
        {"method": "wanda-sp", "num_experts": None},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_a_conversion(tiny_llama: Path, tmp_path: Path, partition: Mapping[str, Any]) -> None:
    calibrate = GROUPS if partition["method"] == "dive" else {}
    config = run_config(tiny_llama, calibrate=calibrate, partition=partition)
    with nothing_without_a_device():
        manifests = run_stages(config, tmp_path, until="assemble")
    assert manifests["assemble"].device == "cpu"


@pytest.mark.parametrize("kind", ["mean-gate", "representative", "error-ridge", "random"])
def test_a_router(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    config = run_config(tiny_llama, router={"kind": kind})
    with nothing_without_a_device():
        assert "build-router" in run_stages(config, tmp_path, until="build-router")


def test_the_stages_that_load_models(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(
        tiny_llama,
        partition={"method": "weave"},
        assemble={"smoke_test": True},
        finetune=TUNED,
        eval={"router": True},
        bench={"tokens": [4], "decode_tokens": 2},
    )
    texts: list[str] = []
    with nothing_without_a_device():
        manifests = run_stages(config, tmp_path)
        generate(str(tmp_path), "The whale", Decoding(4, 0.0, 1.0, 0), on_text=texts.append)
    assert list(manifests)[-3:] == ["finetune", "eval", "bench"]
    assert texts


def test_a_run_goes_on_where_another_device_stopped(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama)
    run_stages(config, tmp_path, until="partition")
    for stage in ("calibrate", "partition"):
        manifest = read_manifest(tmp_path / stage, rebuild="weaver run")
        write_manifest(tmp_path / stage, manifest.model_copy(update={"device": "cuda:1"}))
    before = file_times(tmp_path)
    manifests = run_stages(config, tmp_path, until="build-router")
    devices = {stage: manifest.device for stage, manifest in manifests.items()}
    assert devices == {"calibrate": "cuda:1", "partition": "cuda:1", "build-router": "cpu"}
    after = file_times(tmp_path)
    assert {name: after[name] for name in before} == before
