"""Routers and compensations from partition to the converted model, on weave's own chain."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import file_times, read_results, run_config, run_stages, stage_digests

from weaver.artifacts.manifest import MANIFEST, read_manifest
from weaver.artifacts.store import read_record
from weaver.artifacts.types import FIRST_TOKENS, Compensation, ExpertLayout, Router
from weaver.config.loading import RunConfig
from weaver.config.sections import RouterConfig
from weaver.conversion.routing import read_routed, resolve_router, solve_layer
from weaver.conversion.splitter import layer_generator
from weaver.errors import WeaverError
from weaver.methods.registry import METHODS
from weaver.rundir.inputs import open_partition
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext
from weaver.stages.build_router import build_routers

LAYERS = 4
WEAVE = {"method": "weave"}


def config(model: Path, **sections: Any) -> RunConfig:
    sections["partition"] = {**WEAVE, **sections.get("partition", {})}
    return run_config(model, **sections)


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion by weave; not to be changed."""
    run_dir = tmp_path_factory.mktemp("woven") / "run"
    run_stages(config(tiny_llama), run_dir, until="eval")
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of that conversion without eval; the copy's records name its own folders."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("eval"))
    for record in [*copy.glob("*/stage.json"), *copy.glob(f"*/{MANIFEST}")]:
        record.write_text(record.read_text().replace(str(finished), str(copy)))
    return copy


def outputs(run_dir: Path, stage: str) -> dict[str, str]:
    return read_manifest(run_dir / stage, rebuild="").outputs


def test_weave_goes_through_all_stages_with_a_cost_near_the_intended_one(finished: Path) -> None:
    results = read_results(finished)
    assert results["ffn_sparsity"] == pytest.approx(0.25)
    ratio = results["measured_ffn_flops_per_token"] / results["moe"]["ffn_flops_per_token"]
    assert ratio == pytest.approx(1, abs=0.1)
    counts = [layer["experts_per_token"] for layer in results["expert_usage"]]
    layout = read_record(layer_path(finished / "partition", 0), ExpertLayout)
    assert layout.selection == "threshold"
    # Layers differ as the text wants; pacing holds their mean.
    assert sum(counts) / LAYERS == pytest.approx(layout.top_k, rel=0.1)
    assert counts != [layout.top_k] * LAYERS
    rows = read_manifest(finished / "router", rebuild="").summary["layers"]
    # Set on the calibration tokens, on which the layers were profiled too: what K leaves to a token
    # where the first two of 64 run all experts, less the reserve for other text.
    experts, others = layout.num_routed_experts, 64 - FIRST_TOKENS
    left = layout.top_k - (experts - layout.top_k) * FIRST_TOKENS / others
    for row in rows:
        assert row["oracle_agreement"] > row["chance_agreement"]
        assert row["chance_agreement"] == pytest.approx(left / experts, abs=1e-3)


def test_build_router_takes_over_what_the_partition_propagated(finished: Path) -> None:
    propagated = {
        name.removeprefix("router/"): digest
        for name, digest in outputs(finished, "partition").items()
        if name.startswith("router/")
    }
    assert len(propagated) == 2 * LAYERS
    assert outputs(finished, "router") == propagated


def test_what_was_taken_over_is_what_would_be_solved(finished: Path) -> None:
    partition = open_partition(finished / "partition")
    settings = resolve_router(RouterConfig(), METHODS["weave"])
    for layer in range(LAYERS):
        layout = partition.layout(layer)
        weights = partition.calibration.checkpoint.ffn(layer, torch.float32)
        profile = partition.profile(layer)
        solved = solve_layer(weights, profile, layout, settings, layer_generator(0, layer))
        taken = read_routed(finished / "router", layer, layout)
        for ours, theirs in (
            (solved.router, taken.router),
            (solved.compensation, taken.compensation),
        ):
            assert ours is not None
            assert theirs is not None
            assert ours.tensors().keys() == theirs.tensors().keys()
            for name, tensor in ours.tensors().items():
                assert torch.equal(tensor, theirs.tensors()[name]), name


def test_another_router_section_is_solved_anew_and_said(run_dir: Path) -> None:
    said: list[str] = []
    context = StageContext(run_dir, force=True, say=said.append)
    build_routers(context, RouterConfig(refit=False))

    assert len(said) == 1
    assert "refit: True there, False here" in said[0]
    path = layer_path(run_dir / "router" / "compensation", 0)
    compensation = read_record(path, Compensation)
    assert compensation.down_FD is None
    assert compensation.expert_bias_ED is not None
    propagated = read_record(layer_path(run_dir / "partition" / "router", 0), Router)
    built = read_record(layer_path(run_dir / "router", 0), Router)
    assert torch.equal(built.weight_ED, propagated.weight_ED)


def test_without_compensation_there_are_no_such_files(run_dir: Path, tiny_llama: Path) -> None:
    plain = config(tiny_llama, router={"refit": False, "constants": False})
    run_stages(plain, run_dir, until="assemble", force=True)

    assert not (run_dir / "router" / "compensation").exists()
    assert not (run_dir / "partition" / "router" / "compensation").exists()
    assert layer_path(run_dir / "partition" / "router", LAYERS - 1).exists()


@pytest.mark.parametrize(
    "name",
    [
        "partition/profile/layer_001.safetensors",
        "partition/router/layer_002.safetensors",
        "partition/router/compensation/layer_001.safetensors",
        "router/compensation/layer_003.safetensors",
    ],
)
def test_a_missing_file_is_made_again_to_the_same_bits(
    name: str, run_dir: Path, tiny_llama: Path
) -> None:
    before = stage_digests(run_dir)
    (run_dir / name).unlink()
    (run_dir / name.partition("/")[0] / MANIFEST).unlink()
    times = file_times(run_dir)

    run_stages(config(tiny_llama), run_dir, until="assemble")

    assert stage_digests(run_dir) == before
    after = file_times(run_dir)
    layer = Path(name).name
    untouched = [path for path in times if Path(path).name != layer and MANIFEST not in path]
    assert {path: after[path] for path in untouched} == {path: times[path] for path in untouched}


def test_a_damaged_compensation_of_an_unfinished_stage_is_named(
    run_dir: Path, tiny_llama: Path
) -> None:
    (run_dir / "router" / MANIFEST).unlink()
    path = run_dir / "router" / "compensation" / "layer_001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])

    with pytest.raises(WeaverError, match=r"compensation/layer_001\.safetensors: damaged") as e:
        run_stages(config(tiny_llama), run_dir, until="build-router")
    assert e.value.fix.startswith(f"rm {path}, then rerun weaver build-router --run-dir")


@pytest.mark.parametrize("sequential", [False, True])
def test_a_router_that_cannot_serve_a_threshold_is_refused(
    sequential: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    settings = config(
        tiny_llama, partition={"sequential": sequential}, router={"kind": "mean-gate"}
    )
    with pytest.raises(WeaverError, match="'mean-gate' cannot select experts by threshold") as e:
        run_stages(settings, tmp_path, until="build-router")
    assert e.value.why == "it serves top-k"
    assert not (tmp_path / "partition").exists(), "refused before anything is made"
    by_count = config(
        tiny_llama,
        partition={"sequential": sequential, "options": {"selection": "top-k"}},
        router={"kind": "mean-gate"},
    )
    run_stages(by_count, tmp_path, until="build-router", force=True)


@pytest.mark.parametrize("method", ["cmoe", "wanda-sp"])
def test_compensation_helps_other_methods_too(
    method: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """With 4,096 tokens there are chunks enough to hold some of them out."""
    kl = {}
    experts = None if METHODS[method].is_static else 8
    for name, wanted in (("plain", False), ("compensated", True)):
        settings = run_config(
            tiny_llama,
            calibrate={"tokens": 4096},
            partition={"method": method, "num_experts": experts, "sequential": False},
            router={"refit": wanted, "constants": wanted},
        )
        run_stages(settings, tmp_path / name, until="eval")
        kl[name] = read_results(tmp_path / name)["kl"]
        assert (tmp_path / name / "router" / "compensation").exists() == wanted
    assert kl["compensated"] < 0.95 * kl["plain"]
