"""``pareto``: forecasts of several layouts of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import file_times, run_config, run_stages

from weaver.artifacts.store import read_json
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.conversion.layer_budgets import BUDGET_FILE
from weaver.conversion.pareto import (
    Forecast,
    forecast_layouts,
    pareto_optimal,
)
from weaver.errors import WeaverError
from weaver.rundir.stage_run import StageContext


@pytest.fixture(scope="module")
def calibrated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a finished calibration; not to be changed."""
    run_dir = tmp_path_factory.mktemp("pareto") / "run"
    run_stages(run_config(tiny_llama), run_dir, until="calibrate")
    return run_dir


def forecasts(run_dir: Path, **config: Any) -> tuple[list[Forecast], list[str]]:
    """The forecasts and what was said."""
    said: list[str] = []
    context = StageContext(run_dir, say=said.append)
    values = {"method": "random", "sparsity": 0.25, **config}
    return forecast_layouts(context, PartitionConfig(**values), RouterConfig()), said


def test_a_point_is_optimal_unless_another_is_as_good_in_all_and_better_in_one() -> None:
    points = [
        (0.1, (1.0, 1.1)),  # least error
        (0.2, (1.0, 1.3)),  # fastest at the second number of tokens
        (0.2, (1.0, 1.2)),  # as the one above, but slower
        (0.3, (1.2, 1.0)),  # fastest at the first number
        (0.3, (1.2, 1.0)),  # the same: neither dominates the other
        (0.4, (1.1, 1.0)),  # more error than the two above, and slower
    ]

    assert pareto_optimal(points) == [True, True, False, True, True, False]
    assert pareto_optimal(points[::-1]) == [False, True, True, False, True, True]


@pytest.mark.usefixtures("made_up_costs")
def test_layouts_by_number_of_experts(calibrated: Path) -> None:
    before = file_times(calibrated)
    rows, said = forecasts(calibrated)

    assert file_times(calibrated) == before
    assert said == []
    sizes = [(row.num_experts, row.expert_width, row.active_neurons) for row in rows]
    assert sizes == [(8, 8, 48), (16, 4, 48), (32, 2, 48), (64, 1, 48)]
    for row in rows:
        assert row.sparsity == 0.25
        # 48 of 64 neurons in three matrices, and a row of the router per expert.
        assert row.flops_ratio == pytest.approx((3 * 48 + row.num_experts) / (3 * 64))
        assert row.speedups == pytest.approx([1 / (1 + 0.1 * row.num_experts)] * 2)
    points = [(row.predicted_kl, row.speedups) for row in rows]
    assert [row.optimal for row in rows] == pareto_optimal(points)


def test_the_predicted_kl_is_that_of_the_fisher_budgets(
    tiny_llama: Path, calibrated: Path, tmp_path: Path
) -> None:
    partition = {"method": "weave", "num_experts": 8, "sparsity": 0.25, "allocation": "fisher"}
    run_stages(
        run_config(tiny_llama, partition={**partition, "sequential": False}),
        tmp_path / "fisher",
        until="partition",
        calibration=calibrated / "calibrate",
    )
    budget = read_json(tmp_path / "fisher" / "partition" / BUDGET_FILE, rebuild="")

    rows, _ = forecasts(calibrated, method="weave")

    # Six of eight slices are active in a uniform layer.
    uniform = [
        kl[trials.index(6)] for kl, trials in zip(budget["kl"], budget["trials"], strict=True)
    ]
    assert len(uniform) == 4
    assert rows[0].num_experts == 8
    assert rows[0].predicted_kl == pytest.approx(sum(uniform))
    assert rows[0].predicted_kl > 0


def test_layouts_that_cannot_be_made_are_left_out(calibrated: Path) -> None:
    rows, said = forecasts(calibrated, sparsity=0.05, num_experts=12)

    assert [row.num_experts for row in rows] == [16, 32, 64]
    assert [row.active_neurons for row in rows] == [60, 60, 61]
    assert said == [
        "8 experts left out: sparsity 0.05 leaves 8 of 8 experts active",
        "12 experts left out: 64 neurons do not divide into 12 experts",
    ]
    assert any(row.optimal for row in rows)


def test_a_width_multiple_is_kept(calibrated: Path) -> None:
    rows, said = forecasts(calibrated, expert_width_multiple=4, num_experts=12)

    assert [(row.num_experts, row.expert_width) for row in rows] == [(8, 8), (12, 4), (16, 4)]
    assert [line.split(":")[0] for line in said] == [
        "32 experts left out",
        "64 experts left out",
    ]


def test_a_layout_that_the_method_refuses_is_left_out(calibrated: Path) -> None:
    """Two of eight slices are active, fewer than are to be shared."""
    rows, said = forecasts(calibrated, method="cmoe", sparsity=0.75, options={"shared_experts": 3})

    assert [row.num_experts for row in rows] == [16, 32, 64]
    assert said == [
        "8 experts left out: layer 0 has 2 active experts of 8, of which 3 would be shared"
    ]


def test_a_static_method_has_no_layouts(calibrated: Path) -> None:
    with pytest.raises(WeaverError, match="method flap is static"):
        forecasts(calibrated, method="flap")


def test_no_layout_at_all(calibrated: Path) -> None:
    expected = "no layout of 8, 16, 32, 64 experts can be made"
    with pytest.raises(WeaverError, match=expected) as caught:
        forecasts(calibrated, sparsity=0.995)
    assert caught.value.why == "64 experts: sparsity 0.995 leaves 0 of 64 experts active"
    assert "choose a sparsity between" in caught.value.fix


def test_one_window_is_too_few(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama, calibrate={"tokens": 64})
    run_stages(config, tmp_path, until="calibrate")

    with pytest.raises(WeaverError, match="1 calibration window"):
        forecasts(tmp_path)
