"""Layers in the summary of ``partition``: predicted speed-ups, and softmax weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import run_config, run_stages

from weaver.artifacts.store import read_record
from weaver.artifacts.types import ExpertLayout, Router
from weaver.errors import WeaverError
from weaver.models.accounting import LayerShape
from weaver.models.forecast import predicted_speedup
from weaver.rundir.stage_folders import layer_path


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        # 6 of 8 slices are active; 3 of them are shared.
        ({"method": "cmoe", "options": {"shared_experts": 3}}, LayerShape(24, 5, 8, 3)),
        ({"method": "flap", "num_experts": None, "allocation": "uniform"}, LayerShape(48)),
    ],
    ids=["routed", "static"],
)
def test_the_summary_predicts_the_speed_of_every_layer(
    values: dict[str, object], shape: LayerShape, tiny_llama: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_llama, partition=values)

    manifest = run_stages(config, tmp_path, until="partition")["partition"]
    rows = manifest.summary["layers"]

    assert "weighting" not in manifest.request.config  # as before there was such a choice

    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert (row["shared_neurons"], row["experts"]) == (
            shape.num_shared_neurons,
            shape.n_routed_experts,
        )
        speedups = row["predicted_speedups"]
        assert list(speedups) == ["1", "512"]
        for tokens in (1, 512):
            expected = predicted_speedup([shape], 32, 64, torch.float32, tokens)
            assert speedups[str(tokens)] == pytest.approx(expected, abs=5e-4)
            assert speedups[str(tokens)] > 0


def test_softmax_weights_start_as_a_mean(tiny_llama: Path, tmp_path: Path) -> None:
    values = {"method": "cmoe", "options": {"shared_experts": 3}, "weighting": "softmax"}
    config = run_config(tiny_llama, partition=values)

    run_stages(config, tmp_path, until="assemble")

    for layer in range(4):
        layout = read_record(layer_path(tmp_path / "partition", layer), ExpertLayout)
        router = read_record(layer_path(tmp_path / "router", layer), Router)
        assert (layout.weighting, layout.routed_scaling) == ("softmax", 3.0)
        assert (router.weighting, router.routed_scaling) == ("softmax", 3.0)
    entries = json.loads((tmp_path / "model" / "config.json").read_text())["weaver"]["layers"]
    assert [entry["routed_scaling"] for entry in entries] == [3.0] * 4


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"method": "flap", "num_experts": None}, "partition.weighting=softmax of flap"),
        ({"method": "weave"}, "experts that are selected by a threshold"),
        (
            {"method": "weave", "options": {"selection": "top-k"}},
            "softmax weights with a refit or constants",
        ),
    ],
    ids=["static", "threshold", "compensated"],
)
def test_softmax_weights_that_mean_nothing(
    values: dict[str, object], match: str, tiny_llama: Path, tmp_path: Path
) -> None:
    config = run_config(tiny_llama, partition={**values, "weighting": "softmax"})
    with pytest.raises(WeaverError, match=match):
        run_stages(config, tmp_path, until="partition")
