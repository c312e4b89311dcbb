"""Dense against converted, from the results of eval and bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weaver.report.tables import format_count, format_number, format_percent

HEADERS = ("", "dense", "converted")


def comparison_rows(
    quality: dict[str, Any], speed: list[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Rows of the table of a run: quality, cost, and measured speed; slower ones say so.

    Args:
        quality: ``eval/results.json``.
        speed: ``bench/results.json``.

    Returns:
        Label, dense value and converted value of each row.
    """
    dense, moe = quality["dense"], quality["moe"]
    flops = (dense["ffn_flops_per_token"], quality["measured_ffn_flops_per_token"])
    rows: list[tuple[str, str, str]] = [
        ("perplexity", format_number(dense["perplexity"]), format_number(moe["perplexity"])),
        ("KL to dense, nats/token", "0", format_number(quality["kl"])),
        ("top-1 agreement", "100%", format_percent(quality["top1_agreement"])),
        (
            "active parameters",
            format_count(quality.get("dense_active_parameters") or quality["dense_parameters"]),
            format_count(quality["active_parameters"]),
        ),
        ("FFN FLOPs per token, measured", format_count(flops[0]), format_count(flops[1])),
    ]
    rows += task_rows(
        *({name: task["metrics"] for name, task in each["tasks"].items()} for each in (dense, moe))
    )
    for row in speed:
        rates = (row["dense_tokens_per_second"], row["moe_tokens_per_second"])
        name = f"{row['phase']} tokens/s ({row['tokens']} tokens)"
        slower = " (slower than dense)" if rates[1] < rates[0] else ""
        rows.append((name, format_number(rates[0]), format_number(rates[1]) + slower))
    return rows


def task_rows(
    dense: Mapping[str, Mapping[str, float]], moe: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str, str]]:
    """Rows of tasks: accuracy, per character of a choice where it has one, and perplexity.

    Args:
        dense: metrics of the dense model by task.
        moe: those of the converted one.

    Returns:
        Label, dense value and converted value of each row.
    """
    rows = []
    for task, before in dense.items():
        accuracy = "acc_norm" if "acc_norm" in before else "acc"
        for metric, form in ((accuracy, format_percent), ("perplexity", format_number)):
            if metric in before:
                label = f"{Path(task).stem}, {metric}"
                rows.append((label, form(before[metric]), form(moe[task][metric])))
    return rows
