"""The built-in scorer against the real lm-evaluation-harness, item by item."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.evaluation.harness import open_harness, run_harness
from weaver.evaluation.scoring import Score
from weaver.evaluation.task_files import read_task
from weaver.evaluation.tasks import run_task

pytest.importorskip("lm_eval", reason="the extra weaver-moe[eval] is not installed")

BuildModel = Callable[..., PreTrainedModel]
ITEMS = 100
WORDS = "the sea was calm, and nobody on board knew; a whale's eye: 17 metres".split()  # noqa: SIM905
TASKS: dict[str, dict[str, Any]] = {
    "multiple-choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    },
    # As WinoGrande is written down there: contexts are the choices, the continuation is the target.
    "schema": {
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
    },
    "completion": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
    },
}


def rows(kind: str) -> list[dict[str, Any]]:
    """Items of words drawn at random."""
    draw = random.Random(kind)

    def text(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    made: dict[str, Callable[[], dict[str, Any]]] = {
        "multiple-choice": lambda: {
            "query": text(20) + "?",
            "choices": [f"{text(5)} {letter}" for letter in "abcd"],
            "gold": draw.randrange(4),
        },
        "schema": lambda: {
            "context_options": [text(8) + " and Ann", text(8) + " and Bob"],
            "continuation": text(6),
            "gold": draw.randrange(2),
        },
        "completion": lambda: {"context": text(20), "continuation": text(2)},
    }
    return [made[kind]() for _ in range(ITEMS)]


@pytest.mark.parametrize("kind", TASKS)
def test_log_likelihoods_are_those_of_lm_eval(
    kind: str, build_llama: BuildModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text("\n".join(map(json.dumps, rows(kind))))
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "hf")},
        "test_split": "test",
        **TASKS[kind],
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(task))
    model = build_llama()

    theirs = run_harness(model, tokenizer, open_harness(["own"], include_path=tmp_path))
    ours: list[tuple[Score, ...]] = []
    result = run_task(model, tokenizer, read_task(data), on_item=ours.append)

    samples = sorted(theirs.raw["samples"]["own"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours) == ITEMS
    for sample, scores in zip(samples, ours, strict=True):
        found = [values for (values,) in sample["resps"]]
        assert [score.log_likelihood for score in scores] == pytest.approx(
            [float(value) for value, _ in found], abs=1e-4
        )
        assert [score.greedy for score in scores] == [bool(greedy) for _, greedy in found]
    assert theirs.scores["harness:own"].metrics["acc"] == pytest.approx(result.metrics["acc"])
    assert theirs.scores["harness:own"].correct["acc"] == result.correct["acc"]
