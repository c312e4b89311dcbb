"""The stage: phases, the guard's record, a preset, and a training that diverges."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_config, run_stages, run_values, run_weaver, write_config
from transformers import AutoModelForCausalLM

from weaver.artifacts.manifest import InputRef
from weaver.errors import WeaverError

SHORT = {"batch_size": 2, "sequence_length": 64, "warmup_steps": 1}
GUARD = {
    **{"eval_data": ["builtin:held-out"], "eval_windows": 2, "eval_sequence_length": 64},
    **{"evaluate_every": 2, "precision": "float32"},
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def summary_outputs(run_dir: Path) -> list[str]:
    return list(json.loads((run_dir / "finetune" / "manifest.json").read_text())["outputs"])


def summary_of(run_dir: Path) -> dict[str, Any]:
    manifest = json.loads((run_dir / "finetune" / "manifest.json").read_text())
    summary: dict[str, Any] = manifest["summary"]
    return summary


@pytest.mark.parametrize(
    ("trainable", "learning_rate"), [("all", 3e-3), ("router", 3e-4), ("lora", 3e-3)]
)
def test_distillation_lowers_the_kl_that_eval_measures(
    trainable: str, learning_rate: float, tiny_llama: Path, tmp_path: Path
) -> None:
    finetune = {
        **SHORT,
        **GUARD,
        "trainable": trainable,
        "objective": "distill",
        "steps": 20,
        "learning_rate": learning_rate,
        "evaluate_every": 10,
        # A balance step changes which experts are chosen, whether or not that lowers the KL.
        "balance_update": 0,
    }
    config = run_config(
        tiny_llama,
        finetune=finetune,
        partition={"sparsity": 0.5},
        eval={"windows": 2, "sequence_length": 64},
    )
    manifests = run_stages(config, tmp_path, until="eval")

    summary = manifests["finetune"].summary
    evaluations = summary["evaluations"]
    assert [each["step"] for each in evaluations] == [0, 10, 20]
    best = min(evaluations, key=lambda each: each["kl"])
    assert summary["best_step"] == best["step"] > 0
    assert best["kl"] < evaluations[0]["kl"]
    # The same windows, so that what is written is what was measured.
    assert manifests["eval"].summary["kl"] == pytest.approx(best["kl"], rel=1e-4)
    assert manifests["eval"].summary["dense_perplexity"] == pytest.approx(best["dense_perplexity"])
    assert tensors(tmp_path / "model").keys() == tensors(tmp_path / "finetune/model").keys()
    assert not (tmp_path / "finetune" / "checkpoints").exists()


def test_phases_are_recorded_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    phases = [
        {**SHORT, "trainable": "router", "steps": 2},
        {**SHORT, "trainable": "lora", "tokens": 2 * 64 * 3, "lora": {"rank": 2}},
        {**SHORT, "steps": 1, "sequence_length": 32},
    ]
    config = run_config(tiny_llama, finetune={**GUARD, "phases": phases})
    manifest = run_stages(config, tmp_path, until="finetune")["finetune"]

    assert [p["steps_done"] for p in manifest.summary["phases"]] == [2, 3, 1]
    assert manifest.summary["tokens"] == 2 * 64 * 5 + 2 * 32
    recorded = manifest.request.config["phases"]
    assert [phase["steps"] for phase in recorded] == [2, 3, 1]
    assert recorded[1]["lora"]["alpha"] == 16.0
    assert recorded[0]["learning_rate"] == 2e-5
    card = (tmp_path / "finetune" / "model" / "README.md").read_text()
    assert "6 steps of fine-tuning" in card
    recipe = json.loads((tmp_path / "finetune/model/config.json").read_text())["weaver"]["recipe"]
    assert recipe["finetune"] == manifest.request.config


def test_a_preset_is_recorded_as_its_phases(tiny_llama: Path, tmp_path: Path) -> None:
    finetune = {**GUARD, **SHORT, "preset": "cmoe-2k", "steps": 1}
    manifest = run_stages(run_config(tiny_llama, finetune=finetune), tmp_path, until="finetune")
    (phase,) = manifest["finetune"].request.config["phases"]
    assert (phase["steps"], phase["batch_size"], phase["learning_rate"]) == (1, 2, 5.95e-5)
    assert phase["lora"]["dropout"] == 0.1
    assert "preset" not in manifest["finetune"].request.config


def test_the_dive_preset_trains_overlapping_experts(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(
        tiny_llama,
        calibrate={"groups": True, "tokens": 1000},
        partition={"method": "dive", "sparsity": 0.5, "num_experts": 3},
        finetune={**GUARD, **SHORT, "preset": "dive", "steps": 3, "best_by": "perplexity"},
    )
    manifest = run_stages(config, tmp_path, until="eval")["finetune"]
    phases = manifest.request.config["phases"]
    assert [(phase["trainable"], phase["temperature"]) for phase in phases] == [
        ("router", 1.0),
        ("lora", None),
    ]
    assert [phase["steps_done"] for phase in manifest.summary["phases"]] == [3, 3]
    assert manifest.summary["best_step"] > 0
    before, after = tensors(tmp_path / "model"), tensors(tmp_path / "finetune/model")
    assert before.keys() == after.keys()
    assert not after["model.layers.0.mlp.router.weight"].equal(
        before["model.layers.0.mlp.router.weight"]
    )


def test_downcycling_moves_every_weight(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(
        tiny_llama,
        partition={"sparsity": 0.75, "weighting": "softmax", "options": {"shared_experts": 1}},
        finetune={**GUARD, **SHORT, "preset": "downcycle", "steps": 4},
    )
    manifest = run_stages(config, tmp_path, until="finetune")["finetune"]
    (phase,) = manifest.request.config["phases"]
    assert (phase["balance_loss"], phase["trainable"]) == (0.01, "all")
    assert len(manifest.summary["losses"]) == 4


def test_other_precision_is_another_training(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama, finetune={**GUARD, **SHORT, "steps": 1})
    manifest = run_stages(config, tmp_path, until="finetune")["finetune"]
    assert manifest.request.config["precision"] == "float32"
    other = run_config(tiny_llama, finetune={**GUARD, **SHORT, "steps": 1, "precision": "bfloat16"})
    with pytest.raises(WeaverError, match="precision: 'float32' on disk, 'bfloat16' asked for"):
        run_stages(other, tmp_path, until="finetune")


def test_curves_lie_beside_the_stage(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    words = ["--steps", "2", "--batch-size", "2", "--sequence-length", "64"]
    done = run_weaver("finetune", "--run-dir", tmp_path, *words, "--report-to", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "logs").rglob("events.out.*"))
    assert not any("events" in name for name in summary_outputs(tmp_path))


def test_another_phase_is_named_when_it_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama, finetune={**GUARD, **SHORT, "steps": 1})
    run_stages(config, tmp_path, until="finetune")
    other = run_config(tiny_llama, finetune={**GUARD, **SHORT, "steps": 2})
    with pytest.raises(WeaverError, match=r"phases\.1\.steps: 1 on disk, 2 asked for"):
        run_stages(other, tmp_path, until="finetune")


@pytest.mark.slow
def test_a_missing_package_is_said_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    config = run_config(tiny_llama, finetune={**SHORT, **GUARD, "trainable": "lora"})
    with pytest.raises(WeaverError, match="lora of the attention needs the package peft") as caught:
        run_stages(config, tmp_path, until="finetune")
    assert caught.value.fix == "pip install 'weaver-moe[finetune]'"
    assert not (tmp_path / "finetune").exists()


def test_a_training_that_diverges_leaves_its_best_weights(tiny_llama: Path, tmp_path: Path) -> None:
    finetune = {**GUARD, **SHORT, "steps": 30, "learning_rate": 1e30, "checkpoint_every": 2}
    path = write_config(tmp_path / "run.yaml", run_values(tiny_llama, finetune=finetune))
    run_dir = tmp_path / "run"

    for _ in range(2):  # the second time from the checkpoint, if there is one
        done = run_weaver("run", path, "--run-dir", run_dir)

        assert done.returncode == 1
        text = " ".join(done.stderr.split())
        assert "at step" in text
        assert "the best weights, of step 0 with a held-out KL of" in text
        assert f"are in {run_dir / 'finetune' / 'model'}" in text
        assert "--set finetune.learning_rate=2.5e+29" in text
        assert "Traceback" not in done.stderr
        assert not (run_dir / "finetune" / "manifest.json").exists()
        before, after = tensors(run_dir / "model"), tensors(run_dir / "finetune" / "model")
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_guard_measures_on_text_that_is_kept_from_training(
    tiny_llama: Path, tmp_path: Path
) -> None:
    def inputs(eval_data: list[str] | None, folder: str) -> Mapping[str, InputRef]:
        finetune = {**GUARD, **SHORT, "steps": 1, "eval_data": eval_data}
        config = run_config(tiny_llama, finetune=finetune)
        return run_stages(config, tmp_path / folder, until="finetune")["finetune"].request.inputs

    found, beside = inputs(None, "held out"), inputs(["builtin:calibration"], "named")
    assert found["eval_data"].path == "part of data"
    assert found["data"].path == beside["data"].path == "builtin:calibration"
    for name in ("data", "eval_data"):
        assert found[name].digest != beside[name].digest
