"""The whole chain on a tiny model: every method, options that cross stages, rerun, fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model
from tiny_runs import file_times, read_results, run_config, run_stages, stage_digests
from transformers import AutoModelForCausalLM

import weaver
from weaver.artifacts.store import read_record
from weaver.artifacts.types import ExpertLayout, Router
from weaver.errors import WeaverError
from weaver.methods.registry import METHODS
from weaver.methods.routers import ROUTERS
from weaver.rundir.inspection import inspect_run
from weaver.rundir.stage_folders import STAGE_FOLDERS, layer_path

LAYERS, NEURONS = 4, 64


def _layouts(run_dir: Path) -> list[ExpertLayout]:
    return [read_record(layer_path(run_dir / "partition", i), ExpertLayout) for i in range(LAYERS)]


def _partition(method: str, **values: object) -> dict[str, object]:
    experts = {} if METHODS[method].is_static else {"num_experts": 8}
    return {"method": method, **({} if experts else {"num_experts": None}), **experts, **values}


@pytest.mark.parametrize("sequential", [False, True], ids=["one-shot", "sequential"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_through_all_stages(
    method: str, sequential: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    calibrate = {"groups": True, "tokens": 1000} if METHODS[method].prunes_groups else {}
    partition = _partition(method, sequential=sequential)
    if METHODS[method].prunes_groups:
        partition["num_experts"] = 4  # of six groups
    config = run_config(tiny_llama, calibrate=calibrate, partition=partition)

    manifests = run_stages(config, tmp_path)

    assert list(manifests) == [stage for stage in STAGE_FOLDERS if stage != "finetune"]
    assert (tmp_path / "partition" / "profile").exists() == sequential
    results = read_results(tmp_path)
    assert results["ffn_sparsity"] == pytest.approx(0.25)
    assert results["tokens"] == 4 * 63
    assert results["kl"] > 0
    assert 0 < results["top1_agreement"] < 1
    assert results["moe"]["perplexity"] != results["dense"]["perplexity"]
    assert results["active_parameters"] < results["dense_parameters"]
    static = METHODS[method].is_static
    assert (results["total_parameters"] < results["dense_parameters"]) == static
    rows = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert [(row["phase"], row["tokens"]) for row in rows] == [("prefill", 1)]


def test_a_rerun_skips_every_stage_and_touches_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama)
    first = run_stages(config, tmp_path)
    before = file_times(tmp_path)

    second = run_stages(config, tmp_path)

    assert second == first
    assert file_times(tmp_path) == before


def test_two_runs_of_one_configuration_give_equal_digests(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama)
    for name in ("a", "b"):
        run_stages(config, tmp_path / name, until="eval")

    assert stage_digests(tmp_path / "a") == stage_digests(tmp_path / "b")


def test_the_model_loads_by_the_auto_class_and_is_the_evaluated_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    assert weaver  # importing it registers the converted model types
    run_stages(run_config(tiny_llama), tmp_path, until="eval")
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(40)[None] + 60

    out = moe.generate(ids, max_new_tokens=5, do_sample=False)

    assert out.shape[1] <= 45
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tiny_llama / name).read_bytes()
    assert moe.num_parameters() == read_results(tmp_path)["total_parameters"]
    assert not torch.allclose(moe(ids).logits, dense(ids).logits, atol=1e-3)


@pytest.mark.parametrize("method", ["expertweaver", "cmoe"])
def test_the_router_is_chosen_independently_of_the_method(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    run_stages(run_config(tiny_llama), shared, until="calibrate")
    layouts: dict[str, list[list[int]]] = {}
    weights: dict[str, list[float]] = {}
    for router in ROUTERS:
        config = run_config(
            tiny_llama,
            partition=_partition(method, sequential=False),
            router={"kind": router},
        )
        run_dir = tmp_path / router
        run_stages(config, run_dir, until="eval", calibration=shared / "calibrate")
        layouts[router] = [layout.experts_EN.tolist() for layout in _layouts(run_dir)]
        record = read_record(layer_path(run_dir / "router", 0), Router)
        assert record.kind == ROUTERS[router].kind
        weights[router] = record.weight_ED.flatten().tolist()

    assert layouts["mean-gate"] == layouts["representative"] == layouts["random"]
    assert len({tuple(values) for values in weights.values()}) == len(ROUTERS)


def test_a_sequential_split_runs_behind_the_router_of_the_run(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """From the second layer on, the profile depends on how the layers in front route."""
    profiles = {}
    for router in ("representative", "random"):
        config = run_config(tiny_llama, router={"kind": router})
        manifests = run_stages(config, tmp_path / router, until="partition")
        assert manifests["partition"].request.config["propagate"]["kind"] == router
        outputs = manifests["partition"].outputs
        profiles[router] = [outputs[f"profile/layer_{i:03d}.safetensors"] for i in range(LAYERS)]

    assert profiles["representative"][0] == profiles["random"][0]
    assert profiles["representative"][1] != profiles["random"][1]


def test_a_calibration_of_another_run_gives_the_same_partition(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_llama)
    own = run_stages(config, tmp_path / "own", until="partition")
    calibration = tmp_path / "own" / "calibrate"

    borrowed = run_stages(config, tmp_path / "other", until="build-router", calibration=calibration)

    assert not (tmp_path / "other" / "calibrate").exists()
    assert borrowed["partition"].digest == own["partition"].digest
    states = inspect_run(tmp_path / "other", verify=True)
    assert [(state.stage, state.state) for state in states] == [
        ("partition", "complete"),
        ("build-router", "complete"),
    ]


@pytest.mark.parametrize("method", ["flap", "expertweaver"])
def test_adaptive_allocation_spends_the_same_budget(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    totals, spread = {}, {}
    for allocation in ("uniform", "adaptive"):
        config = run_config(tiny_llama, partition=_partition(method, allocation=allocation))
        run_stages(config, tmp_path / allocation, until="partition")
        active = [layout.active_neurons for layout in _layouts(tmp_path / allocation)]
        totals[allocation], spread[allocation] = sum(active), len(set(active))

    assert totals["uniform"] == totals["adaptive"] == LAYERS * NEURONS * 3 // 4
    assert spread["uniform"] == 1
    assert spread["adaptive"] > 1


def test_neurons_left_over_by_a_width_multiple_join_the_shared_expert(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """64 neurons in 5 slices of 8, the multiple of 8 below 64 / 5: 24 are left over."""
    values = _partition("cmoe", num_experts=5, expert_width_multiple=8)
    run_stages(run_config(tiny_llama, partition=values), tmp_path, until="assemble")

    for layout in _layouts(tmp_path):
        assert layout.expert_width == 8
        assert layout.num_shared_neurons >= 24
        assert (layout.num_shared_neurons - 24) % 8 == 0
        assert layout.permutation.sort().values.tolist() == list(range(NEURONS))
        assert layout.active_neurons == 48


@pytest.mark.parametrize("trainable", ["all", "router"])
def test_fine_tuning_lowers_the_loss_and_eval_measures_its_model(
    trainable: str, tiny_llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the weaver weaves a web of experts. " * 40)
    finetune = {
        "data": [str(text)],
        "trainable": trainable,
        "objective": "next-token",
        "steps": 12,
        "batch_size": 4,
        "sequence_length": 32,
        "learning_rate": 0.02,
        "router_scale_learning_rate": 0.5,
        "warmup_steps": 1,
        "checkpoint_every": 100,
        # Text that a random model does not predict: it learns by leaving the dense model.
        "eval_data": [str(text)],
        "eval_sequence_length": 32,
        "best_by": "perplexity",
    }
    # One batch is the whole text's first windows again and again: the loss has to fall.
    plain = run_config(tiny_llama, eval={"data": [str(text)]})
    tuned = run_config(tiny_llama, eval={"data": [str(text)]}, finetune=finetune)
    run_stages(plain, tmp_path / "plain", until="eval")

    manifests = run_stages(tuned, tmp_path / "tuned", until="eval")

    losses = manifests["finetune"].summary["losses"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    before, after = read_results(tmp_path / "plain"), read_results(tmp_path / "tuned")
    assert after["moe"]["perplexity"] < before["moe"]["perplexity"]
    assert after["dense"] == before["dense"]
    assert manifests["eval"].request.inputs["finetune"].digest == manifests["finetune"].digest
    changed = _changed_tensors(tmp_path / "tuned")
    assert changed
    if trainable == "router":
        assert all(".router." in name for name in changed)
    else:
        assert any("self_attn" in name for name in changed)


def test_eval_without_fine_tuning_refuses_the_results_of_the_tuned_model(
    tiny_llama: Path, tmp_path: Path
) -> None:
    finetune = {"steps": 1, "batch_size": 1, "sequence_length": 32}
    run_stages(run_config(tiny_llama, finetune=finetune), tmp_path, until="eval")

    with pytest.raises(WeaverError, match="made from another assemble, finetune"):
        run_stages(run_config(tiny_llama), tmp_path, until="eval")


def _changed_tensors(run_dir: Path) -> list[str]:
    states = [
        AutoModelForCausalLM.from_pretrained(run_dir / folder).state_dict()
        for folder in ("model", "finetune/model")
    ]
    return [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]


@pytest.fixture(scope="module")
def planted_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second neuron of every layer hardly does anything."""
    folder = tmp_path_factory.mktemp("models") / "planted"
    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=NEURONS)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[::2] *= 0.05
            layer.mlp.up_proj.weight[::2] *= 0.05
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["weave", "flap", "wanda-sp", "expertweaver"])
def test_methods_that_look_at_activations_find_planted_idle_neurons(
    method: str, planted_llama: Path, tmp_path: Path
) -> None:
    """At 50% sparsity the idle half can go almost for free; a random split does not know it."""
    kl = {}
    for name in ("random", method):
        config = run_config(planted_llama, partition=_partition(name, sparsity=0.5))
        run_stages(config, tmp_path / name, until="eval")
        kl[name] = read_results(tmp_path / name)["kl"]

    assert kl[method] < 0.5 * kl["random"]
