"""FLOPs of a converted model in the results of ``eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import add_to_stage, read_results, run_config, run_stages

from weaver.artifacts.results import EvalResult
from weaver.artifacts.types import FIRST_TOKENS
from weaver.config.sections import EvalConfig
from weaver.rundir.stage_run import StageContext
from weaver.stages.evaluate import evaluate

HIDDEN = 32


def evaluated(run_dir: Path) -> dict[str, Any]:
    """Run ``eval``, compare its results with its manifest's summary, and return the results."""
    config = EvalConfig(sequence_length=64, windows=4, router=True)
    summary = evaluate(StageContext(run_dir), config).summary
    results = read_results(run_dir)
    assert EvalResult.model_validate(results).model_dump(mode="json") == results
    assert summary["dense_ffn_flops"] == results["dense"]["ffn_flops_per_token"]
    assert summary["ffn_flops"] == results["moe"]["ffn_flops_per_token"]
    assert summary["measured_ffn_flops"] == results["measured_ffn_flops_per_token"]
    return results


def flops(entry: dict[str, Any], experts: float) -> float:
    """2 D (3 (S + K N) + E) of a layer with a linear router."""
    neurons: float = entry["num_shared_neurons"] + experts * entry["moe_intermediate_size"]
    rows: int = entry["n_routed_experts"]
    return 2 * HIDDEN * (3 * neurons + rows)


@pytest.mark.parametrize("selection", ["top-k", "threshold"])
def test_the_measured_cost_follows_the_experts_that_were_selected(
    tiny_llama: Path, tmp_path: Path, selection: str
) -> None:
    config = run_config(tiny_llama, router={"kind": "mean-gate"})
    run_stages(config, tmp_path, until="assemble")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    entries = values["weaver"]["layers"]
    for entry in entries:
        entry["selection"] = selection
    path.write_text(json.dumps(values))
    add_to_stage(path.parent, [path])

    results = evaluated(tmp_path)

    usage = results["expert_usage"]
    top_k = [entry["num_experts_per_tok"] for entry in entries]
    nominal = sum(flops(entry, k) for entry, k in zip(entries, top_k, strict=True))
    counted = sum(
        flops(entry, sum(layer["token_share"])) for entry, layer in zip(entries, usage, strict=True)
    )
    assert results["moe"]["ffn_flops_per_token"] == nominal
    assert results["measured_ffn_flops_per_token"] == pytest.approx(counted, abs=2)
    for row, layer, entry in zip(results["router"]["layers"], usage, entries, strict=True):
        assert layer["experts_per_token"] == pytest.approx(sum(layer["token_share"]))
        chance = layer["experts_per_token"] / entry["n_routed_experts"]
        # The router chooses for all but the first tokens, which run all experts.
        first = FIRST_TOKENS / results["sequence_length"] if selection == "threshold" else 0.0
        expected = first + (1 - first) * row["chance_agreement"]
        assert expected == pytest.approx(chance)
    assert ([layer["experts_per_token"] for layer in usage] == top_k) == (selection == "top-k")
    assert (results["measured_ffn_flops_per_token"] == nominal) == (selection == "top-k")
