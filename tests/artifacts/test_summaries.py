"""Summaries in the manifests of stages."""

from __future__ import annotations

from typing import Any

import pytest

from weaver.artifacts.summaries import FinetuneSummary, read_summary
from weaver.errors import WeaverError

POINT = {"phase": 0, "perplexity": 9.0, "kl": 0.2, "dense_perplexity": 8.0}
TRAINED: dict[str, Any] = {
    "losses": [3.0, 2.0],
    "tokens": 512,
    "seconds": 1.5,
    "resumed_from": 0,
    "phases": [{"trainable": "full", "objective": "kd", "steps": 2, "steps_done": 2}],
    "evaluations": [{**POINT, "step": 0}, {**POINT, "step": 1, "kl": 0.1}, {**POINT, "step": 2}],
    "best_step": 1,
}


def test_the_best_evaluation_is_of_the_weights_that_were_written() -> None:
    summary = read_summary(FinetuneSummary, TRAINED)
    assert summary.best.kl == 0.1
    assert summary.model_dump(mode="json") == TRAINED


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"tokens": None}, "tokens"),
        ({"more": 1}, "more"),
        ({"evaluations": [{**POINT, "step": "first"}]}, "evaluations.0.step"),
    ],
)
def test_what_no_stage_writes_is_named(change: dict[str, Any], where: str) -> None:
    with pytest.raises(WeaverError, match="damaged FinetuneSummary") as caught:
        read_summary(FinetuneSummary, TRAINED | change)
    assert caught.value.what.endswith(f"in a manifest: {where}")
