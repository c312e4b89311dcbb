"""Exports of models with experts inside experts: weaver's own type, with code; no stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_conversions import (
    ffns_of,
    load_converted,
    random_compensation,
    random_conversions,
    write_converted,
)
from tiny_models import TINY_MOE, random_ids, save_tiny_model
from tiny_runs import run_config, run_stages
from torch import Tensor
from transformers import AutoConfig

from weaver.config.sections import ExportConfig, ModelConfig, VerifyConfig
from weaver.errors import WeaverError
from weaver.export.remote import modeling_weaver
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.stage_run import StageContext
from weaver.stages.export import export, plan_export
from weaver.stages.verify import verify

IDS_WT = random_ids(2, 20)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS_WT).logits
    return found


def remote_logits(folder: Path) -> Tensor:
    """Of a model in a folder, by the remote file's classes."""
    values = AutoConfig.from_pretrained(folder).to_dict()
    classes = values["architectures"][0]
    config = getattr(modeling_weaver, classes.replace("ForCausalLM", "Config"))(**values)
    model = getattr(modeling_weaver, classes)(config).eval()
    # The remote file keeps balance biases as parameters; the names are the same.
    missing = model.load_state_dict(load_converted(folder).state_dict(), strict=True)
    assert not missing.missing_keys
    return logits(model)


@pytest.mark.parametrize("variant", TINY_MOE)
def test_the_remote_file_computes_the_same(tmp_path: Path, variant: str) -> None:
    save_tiny_model(variant, tmp_path / "moe", byte_tokenizer())
    checkpoint = Checkpoint(ModelConfig(path=str(tmp_path / "moe")))
    conversions = random_conversions(checkpoint, shared=4, experts=4, top_k=2, scale=0.5)
    folder = write_converted(checkpoint, tmp_path / "split", conversions)
    expected = logits(load_converted(folder))
    torch.testing.assert_close(remote_logits(folder), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_weaver_made_with_constants_and_thresholds(tmp_path: Path) -> None:
    """Constants of outer experts are output biases of the inner FFNs; all of it twice."""
    save_tiny_model("llama+bias", tmp_path / "dense", byte_tokenizer())
    folders = [tmp_path / name for name in ("dense", "once", "twice")]
    sizes: list[dict[str, Any]] = [
        {"shared": 8, "experts": 5, "top_k": 3},
        {"shared": 4, "experts": 2, "top_k": 2},
    ]
    for source, target, size in zip(folders, folders[1:], sizes, strict=False):
        checkpoint = Checkpoint(ModelConfig(path=str(source)))
        conversions = random_conversions(checkpoint, selection="threshold", **size)
        compensations = None
        if source == folders[0]:
            compensations = [random_compensation(48, 32, 5, seed=layer) for layer in range(3)]
        write_converted(checkpoint, target, conversions, compensations=compensations)
        byte_tokenizer().save_pretrained(target)
    model = load_converted(folders[2])
    assert torch.isfinite(logits(model)).all()
    torch.testing.assert_close(remote_logits(folders[2]), logits(model), rtol=1e-5, atol=1e-5)
    # With every inner expert the constants of the outer ones are what is left to be right.
    checkpoint = Checkpoint(ModelConfig(path=str(folders[1])))
    whole = random_conversions(checkpoint, shared=4, experts=2, top_k=2)
    again = load_converted(write_converted(checkpoint, tmp_path / "whole", whole))
    # Experts inside experts are not paced, so neither is what they are compared with.
    once = load_converted(folders[1])
    for ffn in ffns_of(once):
        ffn.pace = None
    expected = logits(once)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a Qwen2-MoE with shared experts; not to be changed."""
    folder = tmp_path_factory.mktemp("two-level")
    save_tiny_model("qwen2_moe", folder / "moe", byte_tokenizer())
    partition = {"method": "expertweaver", "num_experts": 4}
    run_stages(run_config(folder / "moe", partition=partition), folder / "run", until="assemble")
    return folder / "run"


@pytest.mark.parametrize("target", ["glm4-moe", "granite-moe-shared", "gguf"])
def test_stock_targets_refuse(run_dir: Path, target: str) -> None:
    with pytest.raises(WeaverError, match=f"{target} cannot hold experts inside experts"):
        plan_export(StageContext(run_dir), ExportConfig(target=target, approximate=True))


def test_the_own_type_runs_without_weaver(run_dir: Path, tmp_path: Path) -> None:
    context = StageContext(run_dir)
    plan = plan_export(context, ExportConfig(remote_code=True), tmp_path / "own")
    assert plan.target == "weaver"
    assert "experts inside experts" in plan.reason
    export(context, plan)
    config = VerifyConfig(tokens=128, sequence_length=64, new_tokens=8)
    found = verify(context, tmp_path / "own", config)
    assert found.kl is not None
    assert abs(found.kl) < 1e-6
    assert found.same_text == 1.0


def test_a_folder_in_bfloat16_keeps_what_routers_add(tmp_path: Path) -> None:
    save_tiny_model("glm4_moe", tmp_path / "moe", byte_tokenizer())
    partition = {"method": "random", "num_experts": 4}
    run_stages(run_config(tmp_path / "moe", partition=partition), tmp_path, until="assemble")
    context = StageContext(tmp_path)
    plan = plan_export(context, ExportConfig(target="weaver", dtype="bfloat16"), tmp_path / "own")
    export(context, plan)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    kept = load_converted(tmp_path / "own").state_dict()[name]
    assert torch.equal(kept, load_converted(tmp_path / "model").state_dict()[name])
    assert kept.dtype == torch.float32
