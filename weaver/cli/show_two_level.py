"""Two levels of experts in tables: the experts of a MoE layer are one row, not a hundred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console

from weaver.report.tables import console_table, format_percent

if TYPE_CHECKING:
    from weaver.rundir.inspection import StageState

Row = Mapping[str, Any]


def by_level(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows of a summary with those of one layer's experts merged, and ``layer`` a label.

    Numbers become means over the experts that are split; those that stayed dense are counted in the
    label. Rows of dense models come back as they are.

    Args:
        rows: with ``layer``, and ``part`` for an FFN inside a MoE layer.
    """
    merged = []
    for (layer, kind), group in groupby(rows, key=lambda row: (row["layer"], _kind(row))):
        members = list(group)
        if kind is None:
            merged += [dict(row) for row in members]
            continue
        split = [row for row in members if row.get("experts", 1)] or members
        dense = len(members) - len(split)
        label = f"{layer}: {len(members)} {kind}" if kind == "experts" else f"{layer}: {kind}"
        if dense:
            label += f", {dense} of them dense"
        merged.append({**_mean([dict(row) for row in split]), "layer": label})
    return merged


def _kind(row: Row) -> str | None:
    part = row.get("part")
    return "experts" if part is not None and part.startswith("expert ") else part


def _mean(rows: Sequence[Row]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(first, Mapping):
            merged[key] = _mean(values)
        elif isinstance(first, (int, float)) and any(value != first for value in values):
            merged[key] = round(sum(values) / len(values), 6)
        else:
            merged[key] = first
    return merged


def show_levels(console: Console, states: Sequence[StageState]) -> None:
    """Of a run whose model had experts before: what every FFN sees, and how it is split."""
    from weaver.artifacts.summaries import AssembleSummary, CalibrateSummary, PartitionSummary
    from weaver.artifacts.summaries import read_summary as read

    found = {state.stage: state.manifest.summary for state in states if state.manifest}
    if "calibrate" not in found:
        return
    sites = read(CalibrateSummary, found["calibrate"]).sites
    if not sites:
        return
    rows = [site.model_dump() for site in sites]
    is_split = "partition" in found
    if is_split:
        splits = read(PartitionSummary, found["partition"]).layers
        rows = [row | split.model_dump() for row, split in zip(rows, splits, strict=True)]
    headers = ("layer", "neurons", "tokens", "shared", "experts", "top-k", "active", "sparsity")
    cells = [
        (
            *(row["layer"], row["neurons"], f"{row['tokens']:g}"),
            *((row["shared_neurons"], _experts(row), row["top_k"]) if is_split else ("-",) * 3),
            row.get("active_neurons", "-"),
            format_percent(row["sparsity"]) if is_split else "-",
        )
        for row in by_level(rows)
    ]
    title = "FFNs; of experts the mean, tokens of the calibration that reach them"
    console.print(console_table(title, headers, cells))
    if "assemble" in found:
        account = read(AssembleSummary, found["assemble"])
        console.print(
            f"whole model: FFN sparsity {format_percent(account.ffn_sparsity)} of what the outer "
            f"level uses, FFN FLOPs x{account.ffn_flops / account.dense_ffn_flops:.3f}"
        )


def _experts(row: Row) -> str:
    return f"{row['experts']} x {row['expert_width']}"
