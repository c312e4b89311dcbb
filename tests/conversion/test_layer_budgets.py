"""Fisher budgets on a tiny model: what is kept, what is spent, and where it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model
from tiny_runs import read_results, run_config, run_stages, stage_digests

from weaver.artifacts.manifest import MANIFEST
from weaver.artifacts.store import read_json, read_record
from weaver.artifacts.types import ExpertLayout
from weaver.config.loading import RunConfig
from weaver.conversion.layer_budgets import BUDGET_FILE, Slices
from weaver.errors import WeaverError
from weaver.rundir.stage_folders import layer_path

LAYERS, NEURONS = 4, 64


def fisher(model: Path, method: str = "weave", **values: Any) -> RunConfig:
    experts = None if method == "flap" else values.pop("num_experts", 16)
    calibrate = values.pop("calibrate", {})
    partition = {"method": method, "num_experts": experts, "allocation": "fisher", **values}
    return run_config(model, partition=partition, calibrate=calibrate)


def layouts(run_dir: Path, layers: int = LAYERS) -> list[ExpertLayout]:
    folder = run_dir / "partition"
    return [read_record(layer_path(folder, layer), ExpertLayout) for layer in range(layers)]


def rows_of(layout: ExpertLayout, router_rows: int) -> int:
    """Rows of 2 D FLOPs: three per active neuron, and those of the router."""
    return 3 * layout.active_neurons + (router_rows if layout.num_routed_experts else 0)


def test_slices_by_hand() -> None:
    slices = Slices(neurons=70, count=8, width=8, router_rows=8)
    assert slices.leftover == 6
    assert slices.active(3) == 6 + 24
    # Of 6 uniform slices 0.6, 1 and 1.4 times: 3.6, 6 and 8.4, which is the whole layer.
    assert slices.trials(0.25) == (4, 6)
    # At least two of a routed layer, so that one can be shared; one where there are but two.
    assert slices.trials(0.9) == (2,)
    assert Slices(neurons=64, count=2, width=32, router_rows=2).trials(0.5) == (1,)
    assert Slices(neurons=64, count=64, width=1, router_rows=0).trials(0.99) == (1,)


@pytest.mark.parametrize(("method", "router_rows"), [("weave", 16), ("cmoe", 32), ("flap", 0)])
def test_the_layers_differ_and_stay_within_the_budget(
    method: str, router_rows: int, tiny_llama: Path, tmp_path: Path
) -> None:
    manifests = run_stages(fisher(tiny_llama, method), tmp_path, until="partition")

    summary = manifests["partition"].summary
    budget = read_json(tmp_path / "partition" / BUDGET_FILE, rebuild="")
    found = layouts(tmp_path)
    active = [layout.active_neurons for layout in found]
    assert active == budget["active_neurons"]
    assert [row["active_neurons"] for row in summary["layers"]] == active
    assert summary["predicted_kl"] == budget["predicted_kl"] > 0
    assert summary["uniform_kl"] == budget["uniform_kl"]
    spent = sum(rows_of(layout, router_rows) for layout in found)
    whole = 3 * LAYERS * NEURONS * 3 // 4
    # Less than another slice is left over.
    assert whole - 3 * NEURONS // 16 < spent <= whole
    assert len(set(active)) > 1
    if not router_rows:
        assert budget["predicted_kl"] <= budget["uniform_kl"]
    assert [len(row) for row in budget["kl"]] == [len(sizes) for sizes in budget["trials"]]
    assert all(row == sorted(row, reverse=True) for row in budget["kl"])


def test_what_was_measured_is_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fisher(tiny_llama)
    run_stages(settings, tmp_path, until="partition")
    before = stage_digests(tmp_path)
    folder = tmp_path / "partition"
    (folder / MANIFEST).unlink()
    layer_path(folder, 3).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("weaver.conversion.layer_budgets.measure_curves", None)
        run_stages(settings, tmp_path, until="partition")
    assert stage_digests(tmp_path) == before
    # Without the file it is measured again, to the same bits.
    (folder / MANIFEST).unlink()
    (folder / BUDGET_FILE).unlink()
    run_stages(settings, tmp_path, until="partition")
    assert stage_digests(tmp_path) == before


def test_a_layer_that_hardly_matters_gets_less(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=3, intermediate_size=NEURONS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.05)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    run_stages(fisher(tmp_path / "model"), tmp_path / "run", until="partition")

    first, quiet, last = (layout.active_neurons for layout in layouts(tmp_path / "run", 3))
    assert quiet < min(first, last)


def test_two_experts_have_one_size_to_be_tried_at(tiny_llama: Path, tmp_path: Path) -> None:
    settings = fisher(tiny_llama, num_experts=2, sparsity=0.4)
    run_stages(settings, tmp_path, until="partition")
    assert [layout.active_neurons for layout in layouts(tmp_path)] == [32] * LAYERS


def test_a_budget_that_routers_use_up_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    settings = fisher(tiny_llama, num_experts=2, sparsity=0.5)
    with pytest.raises(WeaverError, match="the smallest layers cost 392 of a budget of 384"):
        run_stages(settings, tmp_path, until="partition")


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        ({"tokens": 64}, "1 calibration window"),
        ({"input_sample_mb": 1e-6}, "keep 1 of 512 FFN inputs, none in some windows"),
    ],
)
def test_too_little_calibration_is_refused(
    calibrate: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeaverError, match=message) as caught:
        run_stages(fisher(tiny_llama, calibrate=calibrate), tmp_path, until="partition")
    assert "trial layers are fitted on some windows" in caught.value.why


def test_weave_with_budgets_goes_through_all_stages(tiny_llama: Path, tmp_path: Path) -> None:
    """At a low sparsity some layer keeps all of its neurons and needs no router."""
    settings = fisher(tiny_llama, sparsity=0.1)
    settings = settings.model_copy(
        update={"eval": settings.eval.model_copy(update={"router": True})}
    )
    run_stages(settings, tmp_path, until="bench")
    dense = [layout.active_neurons == NEURONS for layout in layouts(tmp_path)]
    assert any(dense)
    assert not all(dense)
    results = read_results(tmp_path)
    budget = read_json(tmp_path / "partition" / BUDGET_FILE, rebuild="")
    assert results["predicted_kl"] == budget["predicted_kl"]
    report = results["router"]["layers"]
    for layer, whole in enumerate(dense):
        assert layer_path(tmp_path / "router", layer).exists() != whole
        # Nothing was ranked or clustered in a whole layer.
        for name in ("oracle_agreement", "expert_jaccard", "score_correlation"):
            assert (report[layer][name] is None) == whole
