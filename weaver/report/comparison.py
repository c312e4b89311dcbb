"""Dense against converted, from the results of eval and bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    rows += [row.cells for row in task_rows(dense.task_metrics, moe.task_metrics)]
    for row in speed.rows:
        rates = (row.dense_tokens_per_second, row.moe_tokens_per_second)
        name = f"{row.phase} tokens/s ({row.tokens} tokens)"
        slower = " (slower than dense)" if rates[1] < rates[0] else ""
        rows.append((name, format_number(rates[0]), format_number(rates[1]) + slower))
    return rows


class TaskRow(NamedTuple):
    """A metric of a task, as shown: of the dense model and of the converted one."""

    task: str
    metric: str
    dense: str
    converted: str

    @property
    def label(self) -> str:
        """Name of the task's file, and the metric."""
        return f"{Path(self.task).stem}, {self.metric}"

    @property
    def cells(self) -> tuple[str, str, str]:
        """Label, dense value and converted value."""
        return self.label, self.dense, self.converted


def task_rows(
    dense: Mapping[str, Mapping[str, float]], moe: Mapping[str, Mapping[str, float]]
) -> list[TaskRow]:
    """Rows of tasks: accuracy, per character of a choice where it has one, and perplexity.

    Args:
        dense: metrics of the dense model by task.
        moe: those of the converted one.
    """
    rows = []
    for task, before in dense.items():
        accuracy = "acc_norm" if "acc_norm" in before else "acc"
        for metric, form in ((accuracy, format_percent), ("perplexity", format_number)):
            if metric in before:
                rows.append(TaskRow(task, metric, form(before[metric]), form(moe[task][metric])))
    return rows
