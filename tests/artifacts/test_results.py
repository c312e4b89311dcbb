"""results.json of ``eval``: what it holds, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from weaver.artifacts.results import (
    EvalResult,
    LayerUsage,
    ModelQuality,
    PositionKl,
    TaskResult,
    WindowValues,
)


def eval_result(**changes: Any) -> EvalResult:
    values: dict[str, Any] = {
        "dense": ModelQuality(perplexity=20.0, ffn_flops_per_token=1000),
        "moe": ModelQuality(
            perplexity=25.0,
            ffn_flops_per_token=760,
            tasks={
                "arc": TaskResult(
                    name="arc",
                    kind="multiple-choice",
                    items=2,
                    metrics={"acc": 0.5},
                    correct={"acc": (0, 1)},
                )
            },
        ),
        "measured_ffn_flops_per_token": 770,
        "kl": 0.2,
        "kl_by_position": (PositionKl(first=1, last=1, kl=0.2, tokens=1),),
        "top1_agreement": 0.8,
        "tokens": 2047,
        "sequence_length": 2048,
        "ffn_sparsity": 0.25,
        "dense_parameters": 100,
        "total_parameters": 101,
        "active_parameters": 80,
        "windows": WindowValues(dense_nll=(3.0,), moe_nll=(3.2,), kl=(0.2,), top1_agreement=(0.8,)),
        "expert_usage": (
            LayerUsage(
                layer=0,
                module="model.layers.0.mlp",
                tokens=4,
                token_share=(0.5, 0.5),
                experts_per_token=1.0,
                coefficient_of_variation=0.0,
                dead_share=0.0,
                entropy=0.693,
            ),
        ),
        "config": {"sequence_length": 2048, "tasks": ["arc"]},
        "versions": {"torch": "2.13"},
        "digests": {"model": "abc"},
    }
    return EvalResult(**(values | changes))


def test_the_keys_that_scripts_rely_on() -> None:
    data = json.loads(eval_result().model_dump_json())
    assert data["dense"]["perplexity"] == 20.0
    assert data["moe"]["perplexity"] == 25.0
    assert data["measured_ffn_flops_per_token"] == 770
    assert {"kl", "top1_agreement", "ffn_sparsity", "active_parameters"} <= data.keys()
    assert {"total_parameters", "tokens"} <= data.keys()
    assert data["moe"]["tasks"]["arc"]["correct"]["acc"] == [0, 1]


def test_an_evaluation_survives_json() -> None:
    result = eval_result()
    assert EvalResult.model_validate_json(result.model_dump_json()) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": float("nan")}, "finite number"),
        ({"top1_agreement": 1.5}, "less than or equal to 1"),
        ({"ffn_sparsity": 1.0}, "less than 1"),
        ({"tokens": 0}, "greater than 0"),
        ({"accuracy": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        eval_result(**change)


def test_results_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        eval_result().kl = 0.0  # type: ignore[misc]


def test_windows_have_one_value_each() -> None:
    with pytest.raises(ValidationError, match="window lists differ in length"):
        WindowValues(dense_nll=(1.0, 2.0), moe_nll=(1.0,), kl=(0.0,), top1_agreement=(1.0,))


def test_hits_are_one_per_item() -> None:
    with pytest.raises(ValidationError, match="acc has 1 values, not 2"):
        TaskResult(name="t", kind="schema", items=2, metrics={"acc": 1.0}, correct={"acc": (1,)})
