"""Dense against converted, from the results of eval and bench."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import stdev
from typing import TYPE_CHECKING

from weaver.artifacts.results import TaskResult, TaskScore
from weaver.report.tables import format_count, format_number, format_percent

if TYPE_CHECKING:
    from weaver.artifacts.bench_results import BenchResult
    from weaver.artifacts.results import EvalResult

HEADERS = ("", "dense", "converted")


def comparison_rows(quality: EvalResult, speed: BenchResult) -> list[tuple[str, str, str]]:
    """Rows of the table of a run: quality, cost, and measured speed; slower ones say so.

    Args:
        quality: what ``eval`` wrote.
        speed: what ``bench`` wrote.

    Returns:
        Label, dense value and converted value of each row.
    """
    dense, moe = quality.dense, quality.moe
    flops = (dense.ffn_flops_per_token, quality.measured_ffn_flops_per_token)
    active = (
        quality.dense_active_parameters or quality.dense_parameters,
        quality.active_parameters,
    )
    rows: list[tuple[str, str, str]] = [
        ("perplexity", format_number(dense.perplexity), format_number(moe.perplexity)),
        ("KL to dense, nats/token", "0", format_number(quality.kl)),
        ("top-1 agreement", "100%", format_percent(quality.top1_agreement)),
        ("active parameters", format_count(active[0]), format_count(active[1])),
        ("FFN FLOPs per token, measured", format_count(flops[0]), format_count(flops[1])),
    ]
    for score in task_scores(dense.tasks, moe.tasks):
        before, after, difference = score_cells(score)
        rows.append((score_label(score), before, f"{after} ({difference})"))
    for row in speed.rows:
        rates = (row.dense_tokens_per_second, row.moe_tokens_per_second)
        name = f"{row.phase} tokens/s ({row.tokens} tokens)"
        slower = " (slower than dense)" if rates[1] < rates[0] else ""
        rows.append((name, format_number(rates[0]), format_number(rates[1]) + slower))
    return rows


def task_scores(
    dense: Mapping[str, TaskResult], moe: Mapping[str, TaskResult]
) -> tuple[TaskScore, ...]:
    """Metrics of tasks that are worth showing: accuracies (per character of a choice where a task
    has that one), exact matches, and perplexities.

    Args:
        dense: results of the dense model by task.
        moe: those of the converted one.
    """
    return tuple(
        _score(task, metric, before, moe[task])
        for task, before in dense.items()
        for metric in _shown(before.metrics)
    )


def score_cells(score: TaskScore) -> tuple[str, str, str]:
    """Dense value, converted value and their difference, with standard errors."""
    form = format_percent if score.is_share else format_number
    difference = score.converted - score.dense
    return (
        _with_error(form(score.dense), score.dense_error, form),
        _with_error(form(score.converted), score.converted_error, form),
        _with_error(
            ("+" if difference >= 0 else "") + form(difference), score.difference_error, form
        ),
    )


def score_label(score: TaskScore) -> str:
    """Task and metric, with the number of items and of examples before each."""
    shots = f", {score.shots}-shot" if score.shots else ""
    return f"{score.label} (n={score.items}{shots})"


def _shown(metrics: Mapping[str, float]) -> list[str]:
    accuracy = "acc_norm" if "acc_norm" in metrics else "acc"
    others = ("perplexity", "word_perplexity")
    return [
        name
        for name in metrics
        if name in (accuracy, *others) or (name.startswith("exact_match") and "_stderr" not in name)
    ]


def _score(task: str, metric: str, dense: TaskResult, moe: TaskResult) -> TaskScore:
    name, _, chosen = metric.partition(",")
    error = f"{name}_stderr" + (f",{chosen}" if chosen else "")
    hits = (dense.correct.get(metric, ()), moe.correct.get(metric, ()))
    return TaskScore(
        task=task,
        metric=metric,
        items=moe.items,
        shots=moe.shots,
        dense=dense.metrics[metric],
        converted=moe.metrics[metric],
        dense_error=dense.metrics.get(error),
        converted_error=moe.metrics.get(error),
        difference_error=_paired_error(*hits),
    )


def _paired_error(dense: Sequence[int], moe: Sequence[int]) -> float | None:
    """Standard error of the mean difference of hits."""
    if len(dense) != len(moe) or len(dense) < 2:
        return None
    differences = [b - a for a, b in zip(dense, moe, strict=True)]
    return stdev(differences) / math.sqrt(len(differences))


def _with_error(value: str, error: float | None, form: Callable[[float], str]) -> str:
    return value if error is None else f"{value} ± {form(error)}"
