"""What ``partition`` says about the layers that it made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import run_config, run_stages

from weaver.models.accounting import LayerShape
from weaver.models.forecast import predicted_speedup


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

    rows = run_stages(config, tmp_path, until="partition")["partition"].summary["layers"]

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
