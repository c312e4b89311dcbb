"""All stages on models that are Mixtures of Experts already, down to single experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import NUM_EXPERTS, save_tiny_model
from tiny_runs import (
    file_times,
    read_results,
    run_config,
    run_stages,
    run_weaver,
    stage_digests,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from weaver.artifacts.store import read_record
from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.config.sections import (
    BenchConfig,
    CalibrateConfig,
    EvalConfig,
    ModelConfig,
    RouterConfig,
)
from weaver.conversion.pareto import forecast_layouts
from weaver.conversion.profiling import ExpertInputs, Profiler
from weaver.data.packing import PackedTokens
from weaver.errors import WeaverError
from weaver.kernels.reference import Routing
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext
from weaver.stages import calibrate as calibrate_stage
from weaver.stages import partition as partition_stage
from weaver.stages.bench_layers import bench_run
from weaver.stages.estimate import estimate
from weaver.stages.evaluate import evaluate

TOKENS = 1024
# Of the tiny qwen3_moe: the dense FFN of the first layer, and the four experts of the second.
SITES = range(1 + NUM_EXPERTS)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen3_moe"
    save_tiny_model("qwen3_moe", folder, byte_tokenizer())
    return folder


def moe_config(model: Path, **partition: Any) -> Any:
    return run_config(
        model,
        calibrate={"tokens": TOKENS},
        partition={"num_experts": 4, **partition},
    )


@pytest.fixture(scope="module")
def run_dir(qwen3_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a sequential split; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_stages(moe_config(qwen3_moe, method="weave"), folder)
    return folder


def profiles(run_dir: Path) -> list[LayerProfile]:
    return [read_record(layer_path(run_dir / "calibrate", n), LayerProfile) for n in SITES]


def test_every_expert_is_profiled_on_its_own_tokens(run_dir: Path) -> None:
    """A token reaches two of the four experts, and every profile has the samples it saw."""
    found = profiles(run_dir)
    assert found[0].tokens == TOKENS
    assert sum(profile.tokens for profile in found[1:]) == 2 * TOKENS
    for profile in found:
        assert profile.tokens == int(profile.sample_tokens_M.sum())
        assert profile.marker_neurons_TA.shape[0] == profile.tokens
        assert profile.ffn_inputs_ND.shape[0] == profile.tokens
        assert bool((profile.sample_tokens_M > 0).all())


def test_every_expert_is_split(run_dir: Path) -> None:
    layouts = [read_record(layer_path(run_dir / "partition", n), ExpertLayout) for n in SITES]
    assert [layout.intermediate_size for layout in layouts] == [48, 24, 24, 24, 24]
    assert all(layout.num_routed_experts and layout.ffn_sparsity == 0.25 for layout in layouts)
    different = {tuple(layout.permutation.tolist()) for layout in layouts[1:]}
    assert len(different) == NUM_EXPERTS


def test_results_count_two_levels(run_dir: Path) -> None:
    """A quarter of the neurons that the outer level uses is left out, at a small cost."""
    results = read_results(run_dir)
    assert results["ffn_sparsity"] == pytest.approx(0.25)
    assert results["dense_active_parameters"] < results["dense_parameters"]
    assert results["active_parameters"] < results["dense_active_parameters"]
    assert 0 < results["kl"] < 0.1
    flops = (results["moe"]["ffn_flops_per_token"], results["dense"]["ffn_flops_per_token"])
    assert flops[0] < results["measured_ffn_flops_per_token"] * 1.3 < 1.3 * flops[1]
    used = {each["module"].removeprefix("model.layers."): each for each in results["expert_usage"]}
    assert list(used) == ["0.mlp", *(f"1.mlp.experts.{e}" for e in range(NUM_EXPERTS))]
    seen = 4 * 64
    assert used["0.mlp"]["tokens"] == seen
    assert sum(used[f"1.mlp.experts.{e}"]["tokens"] for e in range(NUM_EXPERTS)) == 2 * seen


def test_the_estimate_of_the_disk(run_dir: Path, qwen3_moe: Path) -> None:
    """Profiles of a sequential partition lie twice; headers are a part of files this small."""
    needs = estimate(
        moe_config(qwen3_moe, method="weave"), Checkpoint(ModelConfig(path=str(qwen3_moe)))
    )
    folders = [run_dir / "calibrate", *(run_dir / "partition" / n for n in ("profile", "router"))]
    files = [path for folder in folders for path in folder.rglob("layer_*.safetensors")]
    used = sum(path.stat().st_size for path in files)
    disk = sum(needs[stage].disk for stage in ("calibrate", "partition", "build-router"))
    assert used == pytest.approx(disk, rel=0.5)


def test_the_model_card_speaks_of_two_levels(run_dir: Path) -> None:
    card = " ".join((run_dir / "model" / "README.md").read_text().split())
    assert "every expert, and every other feed-forward layer, is split" in card
    assert "| FFN sparsity | 25.0% |" in card
    assert "| FFNs | neurons |" in card
    assert "| 1-4 | 24 |" in card


def test_inspect_shows_two_levels(run_dir: Path) -> None:
    done = run_weaver("inspect", run_dir)
    assert done.returncode == 0, done.stderr
    assert "1: 4 experts" in done.stdout
    assert f"{2 * TOKENS // NUM_EXPERTS}" in done.stdout
    assert "FFN sparsity 25.0% of what the outer level uses" in done.stdout


class InterruptionError(Exception):
    """Exception that interrupts a stage in these tests."""


@pytest.mark.parametrize("stage", ["calibrate", "partition"])
def test_interrupted_between_experts_only_the_missing_ones_are_made(
    qwen3_moe: Path,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    module = {"calibrate": calibrate_stage, "partition": partition_stage}[stage]
    config = moe_config(qwen3_moe, method="weave")
    write = module.write_record

    def stopping(path: Path, record: Any) -> None:
        if path == layer_path(tmp_path / stage, 3):
            raise InterruptionError
        write(path, record)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_record", stopping)
        with pytest.raises(InterruptionError):
            run_stages(config, tmp_path, until=stage)
    before = file_times(tmp_path)
    assert f"{stage}/layer_002.safetensors" in before
    run_stages(config, tmp_path, until="assemble")
    after = file_times(tmp_path)
    kept = [f"{stage}/layer_{number:03d}.safetensors" for number in range(3)]
    assert [after[name] for name in kept] == [before[name] for name in kept]
    expected = stage_digests(run_dir)
    assert stage_digests(tmp_path) == {name: expected[name] for name in stage_digests(tmp_path)}


def test_an_expert_that_few_tokens_reach_stays_dense(qwen3_moe: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = run_config(
        qwen3_moe,
        calibrate={"tokens": 256},
        partition={"method": "cmoe", "num_experts": 4, "sequential": False},
    )
    manifests = run_stages(config, tmp_path, until="assemble", say=said.append)
    tokens = [site["tokens"] for site in manifests["calibrate"].summary["sites"]]
    rows = manifests["partition"].summary["layers"]
    dense = [n for n in SITES if not rows[n]["experts"]]
    assert dense == [n for n in SITES if tokens[n] < 128]
    assert 0 < len(dense) < NUM_EXPERTS
    assert [rows[n]["sparsity"] for n in dense] == [0.0] * len(dense)
    assert len(said) == len(dense)
    assert f"stays dense: {tokens[dense[0]]} calibration tokens reach it, fewer than 128" in said[0]


def test_an_expert_that_no_token_reaches(qwen3_moe: Path) -> None:
    checkpoint = Checkpoint(ModelConfig(path=str(qwen3_moe)))
    packed = PackedTokens(
        input_ids_WT=torch.zeros(1, 4, dtype=torch.int64),
        sample_ids_WT=torch.tensor([[0, 0, 1, 1]]),
        sample_groups_M=torch.tensor([0, 0]),
        groups_json='["text"]',
    )
    inputs = ExpertInputs()
    experts_TK = torch.tensor([[0], [0], [0], [2]])
    x_TD = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for rows in (slice(0, 3), slice(3, 4)):
        chosen_TK = experts_TK[rows]
        weights_TK = torch.ones(chosen_TK.shape)
        inputs.add(x_TD[rows], Routing.of_top_k(chosen_TK, weights_TK, NUM_EXPERTS))
    profiler = Profiler(packed, CalibrateConfig(activation_top_k=2), torch.float32, 0, None)

    def profile(expert: int) -> LayerProfile:
        site = checkpoint.sites[1 + expert]
        return profiler.of_site(inputs, site, checkpoint.ffn(site.number, torch.float32))

    assert [profile(expert).tokens for expert in range(NUM_EXPERTS)] == [3, 0, 1, 0]
    assert torch.equal(profile(0).ffn_inputs_ND, x_TD[:3])
    assert profile(0).sample_tokens_M.tolist() == [2, 1]
    assert profile(2).sample_tokens_M.tolist() == [1]
    assert torch.equal(profile(2).ffn_inputs_ND, x_TD[3:])
    assert profile(1).marker_neurons_TA.shape == (0, 2)


def test_a_model_that_weaver_made_is_converted_again(tiny_llama: Path, tmp_path: Path) -> None:
    """Its router and its threshold stay, its shared part and its experts are split."""
    once = run_config(tiny_llama, partition={"method": "weave", "num_experts": 4})
    run_stages(once, tmp_path / "once", until="assemble")
    model = tmp_path / "once" / "model"
    twice = run_config(
        model,
        calibrate={"tokens": TOKENS},
        partition={"method": "expertweaver", "num_experts": 4},
    )
    manifests = run_stages(twice, tmp_path / "twice", until="eval")
    layers = json.loads((tmp_path / "twice" / "model" / "config.json").read_text())["weaver"]
    entry = layers["layers"][0]
    assert entry["outer"]["selection"] == "threshold"
    assert layers["outer_recipe"]["partition"]["method"] == "weave"
    assert len(entry["experts"]) == entry["outer"]["n_routed_experts"]
    summary = manifests["assemble"].summary
    first = json.loads((tmp_path / "once" / "model" / "manifest.json").read_text())["summary"]
    assert summary["dense_ffn_flops"] == pytest.approx(first["ffn_flops"], rel=0.05)
    assert summary["ffn_sparsity"] == pytest.approx(0.25, abs=0.02)
    assert summary["dense_parameters"] == first["total_parameters"]
    assert 0 < manifests["eval"].summary["kl"] < 1


@pytest.mark.parametrize("allocation", ["adaptive", "fisher"])
def test_budgets_of_experts_are_refused(run_dir: Path, tmp_path: Path, allocation: str) -> None:
    config = moe_config(tmp_path, method="cmoe", allocation=allocation).partition
    with pytest.raises(WeaverError, match=f"--allocation {allocation} of a Mixture-of-Experts"):
        partition_stage.partition(
            StageContext(tmp_path), config, RouterConfig(), run_dir / "calibrate"
        )


def test_what_compares_layers_is_refused(run_dir: Path, tmp_path: Path) -> None:
    config = moe_config(tmp_path, method="cmoe").partition
    with pytest.raises(WeaverError, match="pareto of a Mixture-of-Experts model"):
        forecast_layouts(StageContext(tmp_path), config, RouterConfig(), run_dir / "calibrate")
    with pytest.raises(WeaverError, match="eval --router of a Mixture-of-Experts model"):
        evaluate(StageContext(run_dir), EvalConfig(router=True))
    with pytest.raises(WeaverError, match="bench-layer of a model with two levels"):
        bench_run(StageContext(run_dir), BenchConfig(), [], "layer", "real")


def test_inputs_come_back_in_their_batches() -> None:
    inputs = ExpertInputs()
    batches = [torch.arange(6.0).view(3, 2), torch.arange(6.0, 10.0).view(2, 2)]
    for x_TD in batches:
        ids_T1 = torch.zeros(x_TD.shape[0], 1, dtype=torch.int64)
        inputs.add(x_TD, Routing.of_top_k(ids_T1, torch.ones(ids_T1.shape), 1))
    found: list[Tensor] = inputs.batches(torch.tensor([1, 2, 4]))
    assert [batch.tolist() for batch in found] == [[[2.0, 3.0], [4.0, 5.0]], [[8.0, 9.0]]]


def test_groups_of_experts_are_refused(qwen3_moe: Path, tmp_path: Path) -> None:
    config = run_config(qwen3_moe, calibrate={"groups": True})
    with pytest.raises(WeaverError, match="calibrate --groups of a Mixture-of-Experts") as error:
        run_stages(config, tmp_path, until="calibrate")
    assert "another method than dive" in error.value.fix


def test_experts_inside_experts_are_trained(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    before = AutoModelForCausalLM.from_pretrained(copy / "model").state_dict()
    words = ["--steps", "2", "--batch-size", "2", "--sequence-length", "32"]
    by_perplexity = ["--objective", "next-token", "--set", "finetune.best_by=perplexity"]
    done = run_weaver(
        "finetune", "--run-dir", copy, *words, "--learning-rate", "1e-3", *by_perplexity
    )
    assert done.returncode == 0, done.stderr
    after = AutoModelForCausalLM.from_pretrained(copy / "finetune/model").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert any(".experts." in name and "gate_weight" in name for name in moved)
