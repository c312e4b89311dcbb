"""Several runs in one table: a column for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from weaver.artifacts.compared_runs import ComparedRun, Interval
from weaver.report.comparison import score_cells
from weaver.report.tables import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
)

# Marks a difference whose interval excludes 0.
SIGNIFICANT = "*"
NOTE = (
    "95% bootstrap intervals, differences paired by window or item, of a task also from its dense "
    "model; ± standard errors; * excludes 0 (a ratio: 1)."
)


def runs_table(runs: Sequence[ComparedRun]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers and rows; a row in which no run has a value is left out."""
    measures: dict[str, Callable[[ComparedRun], str]] = {
        "model": lambda run: run.model,
        "method": lambda run: run.method + (", fine-tuned" if run.finetuned else ""),
        "FFN sparsity": lambda run: format_percent(run.ffn_sparsity),
        "FFN FLOPs, measured": lambda run: format_percent(run.ffn_flops),
        "KL to dense, nats/token": lambda run: _with_interval(run.kl),
        "  less the first run's": lambda run: _difference(run.kl_difference),
        "perplexity": lambda run: (
            f"{format_number(run.perplexity)} (dense {format_number(run.dense_perplexity)})"
        ),
        "perplexity over dense's": _ratio,
        "top-1 agreement": lambda run: format_percent(run.top1_agreement),
    }
    for task in _names(run.tasks for run in runs):
        measures[f"{task}, n={_items(runs, task)}"] = partial(_score, task)
        measures[f"  {task}, less the first run's"] = partial(_score_difference, task)
    measures["active parameters"] = lambda run: (
        f"{format_count(run.active_parameters)} of {format_count(run.total_parameters)}"
    )
    measures["size of the weights"] = lambda run: format_bytes(run.model_bytes)
    for phase in _names(run.speedups for run in runs):
        measures[f"speed-up, {phase}"] = partial(_speedup, phase)
    measures["timed on"] = lambda run: run.device or ""
    rows = [(name, *(cell(run) for run in runs)) for name, cell in measures.items()]
    return ["", *(run.run for run in runs)], [row for row in rows if any(row[1:])]


def _items(runs: Sequence[ComparedRun], task: str) -> str:
    """Numbers of items, and of examples before each."""
    scores = [run.tasks[task].score for run in runs if task in run.tasks]
    counts = ", ".join(sorted({str(score.items) for score in scores}))
    shots = {score.shots for score in scores} - {0}
    return counts + "".join(f", {count}-shot" for count in sorted(shots))


def _names(each: Iterable[Iterable[str]]) -> list[str]:
    """Keys of several dictionaries, each once, in the order in which they come."""
    names: dict[str, None] = {}
    for keys in each:
        names.update(dict.fromkeys(keys))
    return list(names)


def _with_interval(value: Interval) -> str:
    low, high = format_number(value.low), format_number(value.high)
    return f"{format_number(value.mean)} ({low}-{high})"


def _difference(value: Interval | None, form: Callable[[float], str] = format_number) -> str:
    if value is None:
        return ""
    mean, low, high = (
        f"{'+' if each >= 0 else ''}{form(each)}" for each in (value.mean, value.low, value.high)
    )
    return f"{mean} ({low} to {high})" + (f" {SIGNIFICANT}" if value.excludes_zero else "")


def _score(task: str, run: ComparedRun) -> str:
    found = run.tasks.get(task)
    if found is None:
        return ""
    dense, converted, difference = score_cells(found.score)
    if found.from_dense is not None:
        difference = _difference(found.from_dense, format_percent)
    return f"{converted} (dense {dense}); {difference}"


def _score_difference(task: str, run: ComparedRun) -> str:
    found = run.tasks.get(task)
    return _difference(found.difference, format_percent) if found else ""


def _ratio(run: ComparedRun) -> str:
    """Perplexity over the dense model's, from the paired differences of log-likelihoods."""
    value = run.nll_increase
    mean, low, high = (math.exp(each) for each in (value.mean, value.low, value.high))
    return f"{mean:.3f} ({low:.3f}-{high:.3f})" + (f" {SIGNIFICANT}" if value.excludes_zero else "")


def _speedup(phase: str, run: ComparedRun) -> str:
    if phase not in run.speedups:
        return ""
    slower = ", slower than dense" if run.speedups[phase] < 1 else ""
    return format_ratio(run.speedups[phase]) + slower
