"""Task metrics: by hand from scores, and end to end on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.evaluation.scoring import Score
from weaver.evaluation.task_files import TaskFile, TaskItem, read_task
from weaver.evaluation.tasks import run_task, standard_error, summarise

BuildModel = Callable[..., PreTrainedModel]


def scores(*values: float) -> tuple[Score, ...]:
    return tuple(Score(value, greedy=False) for value in values)


def test_choice_metrics_by_hand() -> None:
    items = (
        TaskItem(("q", "q"), ("no", "perhaps so"), 1),  # -3 / 2 = -1.5 against -4 / 10 = -0.4
        TaskItem(("q", "q"), ("a", "b"), 0),
        TaskItem(("q", "q"), ("a", "b"), 1),  # a tie: the first counts as chosen
    )
    task = TaskFile("t", "multiple-choice", items)
    result = summarise(task, [scores(-3, -4), scores(-1, -2), scores(-2, -2)])
    assert result.correct == {"acc": (0, 1, 0), "acc_norm": (1, 1, 0)}
    assert result.metrics["acc"] == pytest.approx(1 / 3)
    assert result.metrics["acc_norm"] == pytest.approx(2 / 3)
    # sqrt(1/3 * 2/3 / 2) = 1/3 for both
    assert result.metrics["acc_stderr"] == pytest.approx(1 / 3)
    assert result.metrics["acc_norm_stderr"] == pytest.approx(1 / 3)
    assert result.items == 3


def test_length_is_counted_in_characters_not_bytes() -> None:
    item = TaskItem(("q", "q"), ("äöü", "abcd"), 0)
    # Per character -3/3 = -1 against -4.4/4 = -1.1; per byte it would be -0.5 against -1.1.
    # With -3.6: -1.2 per character loses, -0.6 per byte would win.
    task = TaskFile("t", "multiple-choice", (item, item))
    result = summarise(task, [scores(-3, -4.4), scores(-3.6, -4.4)])
    assert result.correct["acc_norm"] == (1, 0)


def test_schema_metrics_by_hand() -> None:
    item = TaskItem(("x", "y"), ("z", "z"), 1)
    result = summarise(TaskFile("t", "schema", (item, item)), [scores(-2, -1), scores(-1, -2)])
    assert result.metrics == {"acc": 0.5, "acc_stderr": 0.5}
    assert result.correct == {"acc": (1, 0)}


def test_completion_metrics_by_hand() -> None:
    item = TaskItem(("c",), ("d",), 0)
    rows = [(Score(-1.0, greedy=True),), (Score(-3.0, greedy=False),)]
    result = summarise(TaskFile("t", "completion", (item, item)), rows)
    assert result.metrics["acc"] == 0.5
    assert result.metrics["log_likelihood"] == -2.0
    assert result.metrics["perplexity"] == pytest.approx(math.exp(2.0))
    assert result.correct == {"acc": (1, 0)}


def test_a_very_long_continuation_has_no_perplexity() -> None:
    item = TaskItem(("c",), ("d",), 0)
    result = summarise(TaskFile("t", "completion", (item,)), [scores(-2000.0)])
    assert "perplexity" not in result.metrics
    assert result.metrics["log_likelihood"] == -2000.0


def test_standard_error_by_hand() -> None:
    assert standard_error([1, 1, 0, 0, 0]) == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    assert standard_error([1]) == 0.0


@torch.no_grad()
def text_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> float:
    """Log-likelihood by the definition, one sequence at a time; one token is one byte."""
    ids = torch.tensor(tokenizer(f"{context} {continuation}")["input_ids"])
    log_p_TV = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
    scored = len(continuation.encode()) + 1
    return log_p_TV[:-1].gather(-1, ids[1:, None])[-scored:].sum().item()


def test_a_choice_file_end_to_end(
    build_llama: BuildModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build_llama(num_key_value_heads=2)
    rows = [
        {"query": f"Question {i}: what?", "choices": ["one", "twenty two", f"{i}"], "gold": i % 3}
        for i in range(12)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    task = read_task(path, 10)
    seen: list[tuple[Score, ...]] = []
    result = run_task(model, tokenizer, task, on_item=seen.append)
    expected, expected_norm = [], []
    for i, row in enumerate(rows[:10]):
        choices = ["one", "twenty two", f"{i}"]
        values = [text_score(model, tokenizer, f"Question {i}: what?", c) for c in choices]
        norm = [v / len(c) for v, c in zip(values, choices, strict=True)]
        expected.append(int(values.index(max(values)) == row["gold"]))
        expected_norm.append(int(norm.index(max(norm)) == row["gold"]))
    assert result.name == "quiz"
    assert result.items == 10
    assert list(result.correct["acc"]) == expected
    assert list(result.correct["acc_norm"]) == expected_norm
    assert len(seen) == 10

    rest: list[tuple[Score, ...]] = []
    resumed = run_task(model, tokenizer, task, done=seen[:7], on_item=rest.append)
    assert rest == seen[7:]
    assert resumed == result


def test_a_schema_file_end_to_end(
    build_llama: BuildModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build_llama()
    contexts = ["Ann met Bob and Ann", "Ann met Bob and Bob"]
    path = tmp_path / "s.jsonl"
    rows = [
        {"context_options": contexts, "continuation": word, "gold": 0} for word in ("ran", "slept")
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    values = [
        [text_score(model, tokenizer, context, word) for context in contexts]
        for word in ("ran", "slept")
    ]
    expected = [int(first >= second) for first, second in values]
    assert list(run_task(model, tokenizer, read_task(path)).correct["acc"]) == expected


def test_a_completion_file_end_to_end(
    build_llama: BuildModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = build_llama()
    path = tmp_path / "l.jsonl"
    pairs = [("once upon a", "time"), ("the end", "is near")]
    path.write_text("\n".join(json.dumps({"context": c, "continuation": t}) for c, t in pairs))
    result = run_task(model, tokenizer, read_task(path))
    mean = sum(text_score(model, tokenizer, c, t) for c, t in pairs) / 2
    assert result.metrics["log_likelihood"] == pytest.approx(mean, abs=1e-3)
    assert result.metrics["acc"] == 0.0
    assert run_task(model, tokenizer, read_task(path)) == result
