"""Zero-shot tasks from local files: multiple choice, schemas, last-word prediction.

Deterministic: the first ``limit`` items in file order, no sampling anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.artifacts.results import TaskResult
from weaver.evaluation.logits import MAX_NLL
from weaver.evaluation.scoring import (
    Request,
    Score,
    context_length,
    encode_pair,
    score_questions,
)
from weaver.evaluation.task_files import TaskFile, TaskItem, TaskKind

OnItem = Callable[[tuple[Score, ...]], None]
Hits = tuple[Literal[0, 1], ...]


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskFile,
    *,
    done: Sequence[tuple[Score, ...]] = (),
    on_item: OnItem | None = None,
) -> TaskResult:
    """Score a model on the items of a task.

    - multiple choice: ``acc`` takes the choice with the highest log-likelihood; ``acc_norm`` the
      highest log-likelihood per character of the choice (its leading space not counted), as
      lm-evaluation-harness does.
    - schema: ``acc``: the context under which the continuation is most likely.
    - completion: ``acc``: greedy decoding gives every token of the continuation;
      ``log_likelihood``: mean over items of the continuation's; ``perplexity = exp(-that)``,
      per continuation and not per token, as lm-evaluation-harness reports LAMBADA.

    Every accuracy has ``*_stderr = sqrt(p (1 - p) / (n - 1))``. Texts longer than the model's
    context are cut on the left.

    Args:
        model: a causal LM, in the dtype it is to be measured in.
        tokenizer: its tokenizer.
        task: its items, as ``weaver.evaluation.task_files.read_task`` reads them.
        done: scores of the first items from an interrupted run, which are taken over.
        on_item: called with the scores of every other item.
    """
    max_length = context_length(model)
    questions = [_requests(tokenizer, item, max_length) for item in task.items]
    scores = list(done)
    for question_scores in score_questions(model, questions, first=len(done)):
        scores.append(question_scores)
        if on_item is not None:
            on_item(question_scores)
    return summarise(task, scores)


def summarise(task: TaskFile, scores: Sequence[Sequence[Score]]) -> TaskResult:
    """Metrics of a task from the scores of its candidates; see ``run_task``.

    Args:
        task: the items.
        scores: one score per candidate, item by item.
    """
    correct = METRICS[task.kind](task.items, scores)
    metrics: dict[str, float] = {}
    for name, hits in correct.items():
        metrics[name] = sum(hits) / len(hits)
        metrics[f"{name}_stderr"] = standard_error(hits)
    if task.kind == "completion":
        mean = math.fsum(score[0].log_likelihood for score in scores) / len(scores)
        metrics["log_likelihood"] = mean
        if -mean < MAX_NLL:  # a continuation of many hundred tokens has no finite perplexity
            metrics["perplexity"] = math.exp(-mean)
    return TaskResult(
        name=task.name, kind=task.kind, items=len(task.items), metrics=metrics, correct=correct
    )


def standard_error(hits: Sequence[int]) -> float:
    """Standard error of a share, ``sqrt(p (1 - p) / (n - 1))``; 0 for a single item."""
    share = sum(hits) / len(hits)
    return math.sqrt(share * (1.0 - share) / max(len(hits) - 1, 1))


def _requests(tokenizer: PreTrainedTokenizerBase, item: TaskItem, max_length: int) -> list[Request]:
    pairs = zip(item.contexts, item.continuations, strict=True)
    return [encode_pair(tokenizer, context, text, max_length) for context, text in pairs]


def _multiple_choice_hits(
    items: Sequence[TaskItem], scores: Sequence[Sequence[Score]]
) -> dict[str, Hits]:
    per_character = [
        [s.log_likelihood / len(text) for s, text in zip(row, item.continuations, strict=True)]
        for item, row in zip(items, scores, strict=True)
    ]
    return _schema_hits(items, scores) | {"acc_norm": _hits(items, per_character)}


def _schema_hits(items: Sequence[TaskItem], scores: Sequence[Sequence[Score]]) -> dict[str, Hits]:
    return {"acc": _hits(items, [[s.log_likelihood for s in row] for row in scores])}


def _completion_hits(
    _items: Sequence[TaskItem], scores: Sequence[Sequence[Score]]
) -> dict[str, Hits]:
    return {"acc": tuple(1 if row[0].greedy else 0 for row in scores)}


METRICS: dict[
    TaskKind, Callable[[Sequence[TaskItem], Sequence[Sequence[Score]]], dict[str, Hits]]
] = {
    "multiple-choice": _multiple_choice_hits,
    "schema": _schema_hits,
    "completion": _completion_hits,
}


def _hits(items: Sequence[TaskItem], values: Sequence[Sequence[float]]) -> Hits:
    """Whether the highest value of each item, the first on a tie, is the gold one."""
    return tuple(
        1 if row.index(max(row)) == item.gold else 0
        for item, row in zip(items, values, strict=True)
    )
