"""DIVE through the stages: mined domains, overlapping experts, and what is asked for too much."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import read_results, run_config, run_stages, run_weaver, stage_digests
from transformers import AutoModelForCausalLM

from weaver.artifacts.affinity import Affinity
from weaver.artifacts.manifest import MANIFEST, read_manifest
from weaver.artifacts.store import read_record
from weaver.artifacts.types import Compensation, ExpertLayout
from weaver.config.loading import RunConfig
from weaver.config.sections import ModelConfig, RouterConfig
from weaver.conversion import domain_affinity
from weaver.conversion.pareto import forecast_layouts
from weaver.data import grouping
from weaver.errors import WeaverError
from weaver.evaluation.perplexity import perplexity
from weaver.methods.registry import get_method
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.inputs import affinity_path, open_partition, read_held_out, read_packed_tokens
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext
from weaver.stages.estimate import estimate

DIVE = {"method": "dive", "sparsity": 0.5, "num_experts": 3, "options": {"affinity_windows": 2}}


def config(model: Path, **sections: Any) -> RunConfig:
    sections["calibrate"] = {"groups": True, "tokens": 768} | sections.get("calibrate", {})
    sections["partition"] = DIVE | sections.get("partition", {})
    return run_config(model, **sections)


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion by DIVE with a router report; not to be changed."""
    run_dir = tmp_path_factory.mktemp("dive") / "run"
    settings = config(tiny_llama, assemble={"smoke_test": True}, eval={"router": True})
    run_stages(settings, run_dir)
    return run_dir


@pytest.fixture
def calibrated(finished: Path, tmp_path: Path) -> Path:
    """A copy of its calibration."""
    shutil.copytree(finished / "calibrate", tmp_path / "run" / "calibrate")
    return tmp_path / "run"


def test_the_matrix_is_perplexity_of_models_pruned_by_flap(
    finished: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry again: calibrate on that group alone, convert with FLAP, measure."""
    found = read_record(affinity_path(finished / "partition"), Affinity)
    held_out = read_held_out(finished / "calibrate")
    assert len(found.groups) == 6
    assert (found.text, found.tokens) == ("held-out", 2 * 63)
    own = open_partition(finished / "partition").calibration
    seen: dict[int, Any] = {}
    flap = get_method("flap")

    def noting(problem: Any, options: Any, generator: Any) -> ExpertLayout:
        layout = flap.partition(problem, options, generator)
        profile = own.profile(problem.layer)
        assert profile.group_hidden_mean_GF is not None
        rows = (profile.group_hidden_mean_GF == problem.profile.hidden_mean_F).all(1).nonzero()
        seen.setdefault(int(rows), []).append(layout)
        return layout

    shutil.copytree(finished / "calibrate", tmp_path / "run" / "calibrate")
    monkeypatch.setattr(domain_affinity, "get_method", lambda _: replace(flap, partition=noting))
    again = run_stages(config(tiny_llama), tmp_path / "run", until="partition")["partition"]
    assert again.digest == read_manifest(finished / "partition", rebuild="").digest
    assert {group: len(layouts) for group, layouts in seen.items()} == dict.fromkeys(range(6), 4)
    assert all(layout.active_neurons == 32 for layouts in seen.values() for layout in layouts)
    model = masked(tiny_llama, seen[4])
    value = perplexity(model, held_out.of(1)[:2]).perplexity
    assert value == pytest.approx(float(found.perplexity_GG[4, 1]), rel=1e-5)


def masked(folder: Path, layouts: list[ExpertLayout]) -> Any:
    """The dense model with the dropped neurons' down columns zero, and FLAP's bias beside them."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for decoder_layer, layout in zip(model.model.layers, layouts, strict=True):
        down = decoder_layer.mlp.down_proj
        dropped_F = torch.ones(layout.intermediate_size, dtype=torch.bool)
        dropped_F[layout.shared_S] = False
        assert layout.output_bias_D is not None
        with torch.no_grad():
            down.weight[:, dropped_F] = 0.0
            down.bias = torch.nn.Parameter(layout.output_bias_D)
    return model


def test_experts_are_the_clusters_and_overlap(finished: Path) -> None:
    partition = open_partition(finished / "partition")
    found = read_record(affinity_path(partition.folder), Affinity)
    assert found.experts_G.unique().tolist() == [0, 1, 2]
    shares = 0
    for layer in range(4):
        layout = partition.layout(layer)
        assert layout.overlap
        assert layout.experts_EN.shape == (3, 32)
        assert (layout.top_k, layout.ffn_sparsity) == (1, 0.5)
        shares += layout.permutation.unique().numel() < 96
        path = layer_path(finished / "router" / "compensation", layer)
        compensation = read_record(path, Compensation)
        assert list(compensation.tensors()) == ["expert_bias_ED"]
        assert compensation.expert_bias_ED is not None
        assert layout.expert_bias_ED is not None
        assert torch.equal(compensation.expert_bias_ED, layout.expert_bias_ED)
    assert shares == 4
    summary = partition.manifest.summary["affinity"]
    assert summary["experts"] == found.experts_G.tolist()
    assert (finished / "partition" / "affinity" / "affinity.svg").exists()


def test_every_stage_knows_that_more_is_stored_than_the_dense_model_has(finished: Path) -> None:
    results = read_results(finished)
    manifest = read_manifest(finished / "model", rebuild="")
    assert results["ffn_sparsity"] == 0.5
    assert results["total_parameters"] > results["dense_parameters"] > results["active_parameters"]
    assert results["total_parameters"] == manifest.summary["total_parameters"]
    assert manifest.summary["smoke_test"]["kl"] > 0
    assert all(sum(row["token_share"]) == pytest.approx(1) for row in results["expert_usage"])
    report = results["router"]
    assert report["mean"]["expert_jaccard"] > 0.5
    assert report["mean"]["chance_agreement"] == pytest.approx(1 / 3)
    for row in read_manifest(finished / "router", rebuild="").summary["layers"]:
        # On the calibration text the router is better than a draw.
        assert row["captured_contribution"] > 0.5


def test_a_dry_run_counts_what_is_stored(finished: Path, tiny_llama: Path) -> None:
    checkpoint = Checkpoint(ModelConfig(path=str(tiny_llama)))
    needs = estimate(config(tiny_llama), checkpoint)
    written = (finished / "model" / "model.safetensors").stat().st_size
    # Without routers, constants and the header of the file.
    assert 0.9 * written < needs["assemble"].disk < written
    assert needs["eval"].memory > 2 * checkpoint.total_parameters() * 4


def test_rows_that_were_measured_are_not_measured_again(
    finished: Path, calibrated: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def stopping(*arguments: Any) -> Any:
        measured.append(1)
        if len(measured) == 2 * 6 + 3:
            raise KeyboardInterrupt
        return perplexity(*arguments)

    monkeypatch.setattr(domain_affinity, "perplexity", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config(tiny_llama), calibrated, until="partition")
    rows = sorted((calibrated / "partition" / "affinity").glob("row_*"))
    assert [row.name for row in rows] == ["row_000.safetensors", "row_001.safetensors"]
    times = [row.stat().st_mtime_ns for row in rows]
    measured.clear()

    def counting(*arguments: Any) -> Any:
        measured.append(1)
        return perplexity(*arguments)

    monkeypatch.setattr(domain_affinity, "perplexity", counting)
    run_stages(config(tiny_llama), calibrated, until="partition")
    assert len(measured) == 4 * 6
    assert [row.stat().st_mtime_ns for row in rows] == times
    assert stage_digests(calibrated)["partition"] == stage_digests(finished)["partition"]
    # Nor is a matrix that is complete.
    (calibrated / "partition" / MANIFEST).unlink()
    layer_path(calibrated / "partition", 2).unlink()
    monkeypatch.setattr(domain_affinity, "perplexity", lambda *_: pytest.fail("was measured again"))
    run_stages(config(tiny_llama), calibrated, until="partition")


def test_without_held_out_text_the_calibration_windows_are_taken(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "HELD_OUT_TOKENS", 0)
    run_stages(config(tiny_llama), tmp_path / "run", until="partition")
    found = read_record(affinity_path(tmp_path / "run" / "partition"), Affinity)
    assert (found.text, found.tokens) == ("calibration", 2 * 63)
    packed = read_packed_tokens(tmp_path / "run" / "calibrate")
    assert packed.input_ids_WT.shape == (12, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"top_k": 2, "affinity_windows": 1}},
        {"sequential": True},
        {"expert_width_multiple": 20},
    ],
)
def test_other_forms_of_it_convert_too(
    calibrated: Path, tiny_llama: Path, changes: dict[str, Any]
) -> None:
    run_stages(config(tiny_llama, partition=changes), calibrated, until="eval")
    layout = open_partition(calibrated / "partition").layout(1)
    if "options" in changes:
        assert (layout.experts_EN.shape, layout.top_k) == ((3, 16), 2)
    if "expert_width_multiple" in changes:
        assert layout.experts_EN.shape == (3, 20)
    if "sequential" in changes:
        assert (calibrated / "partition" / "profile" / "layer_003.safetensors").exists()
    assert read_results(calibrated)["kl"] > 0


def test_without_constants_it_has_a_stock_form(calibrated: Path, tiny_llama: Path) -> None:
    run_stages(config(tiny_llama, router={"constants": False}), calibrated, until="assemble")
    assert not (calibrated / "router" / "compensation").exists()
    done = run_weaver("export", calibrated, "--to", "glm4-moe")
    assert done.returncode == 0, done.stderr
    folder = calibrated / "export-glm4-moe"
    done = run_weaver("verify", folder, "--against", calibrated, "--tokens", "512")
    assert done.returncode == 0, done.stdout + done.stderr


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 7}, "7 experts for 6 groups"),
    ({"num_experts": 1}, "num_experts=1, of which a token uses 1"),
    ({"allocation": "fisher"}, "dive with --allocation fisher"),
    ({"sparsity": 0.995}, "an expert would be empty"),
    ({"options": {"top_k": 3}}, "options of method dive: top_k"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_it_cannot_do(
    calibrated: Path, tiny_llama: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeaverError, match=message):
        run_stages(config(tiny_llama, partition=changes), calibrated, until="partition")
    assert not (calibrated / "partition").exists()


def test_halves_without_a_group_are_no_partition_by_groups(
    calibrated: Path, tiny_llama: Path
) -> None:
    """One window, and so one sample, of each group."""
    shutil.rmtree(calibrated / "calibrate")
    one = {"tokens": 6 * 512, "sequence_length": 512}
    settings = config(tiny_llama, calibrate=one, eval={"router": True})
    with pytest.raises(WeaverError, match="half of the calibration samples have none of") as caught:
        run_stages(settings, calibrated, until="eval")
    assert "--no-router" in caught.value.fix


def test_groups_have_to_be_kept_apart_before(tiny_llama: Path, tmp_path: Path) -> None:
    mixed = config(tiny_llama, calibrate={"groups": False})
    with pytest.raises(WeaverError, match="the calibration mixes its 6 groups") as caught:
        run_stages(mixed, tmp_path / "run", until="partition")
    assert "--groups --force" in caught.value.fix


def test_a_refit_and_a_pareto_front_are_refused(finished: Path, tiny_llama: Path) -> None:
    refit = config(tiny_llama, router={"refit": True})
    with pytest.raises(WeaverError, match="a refit of dive"):
        run_stages(refit, finished, until="build-router")
    assert refit.router == RouterConfig(refit=True)
    with pytest.raises(WeaverError, match="method dive has experts of one width"):
        forecast_layouts(StageContext(finished), config(tiny_llama).partition, RouterConfig())


def test_the_table_and_the_flags(finished: Path) -> None:
    done = run_weaver(
        *("partition", "--run-dir", finished, "--method", "dive", "--sparsity", "0.5"),
        *("--num-experts", "3", "--set", "partition.options.affinity_windows=2"),
    )
    assert done.returncode == 0, done.stderr
    assert "held-out text, 126 tokens each" in done.stdout
    assert "  expert 0: 1 " in done.stdout
