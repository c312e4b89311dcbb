"""Tables that ``weaver bench`` prints: measured speeds, and predicted ones of the GPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from weaver.report.speeds import bench_columns, bench_title
from weaver.report.tables import console_table, format_percent, format_ratio

if TYPE_CHECKING:
    from weaver.kernels.roofline import RooflineRow

# Columns of a terminal that shows the whole table of a benchmark.
WIDE_ENOUGH = 150


def show_bench(console: Console, summary: dict[str, Any]) -> None:
    """Dense against converted, a row per number of tokens."""
    title = bench_title(summary["header"])
    narrow = console.width < WIDE_ENOUGH
    console.print(console_table(title, *bench_columns(summary["rows"], narrow=narrow)))


def show_roofline(console: Console, device: str, note: str, rows: Sequence[RooflineRow]) -> None:
    """Predicted speed-ups of the GPU kernels."""
    headers = (
        *("FFN of", "sparsity", "slices", "tokens", "kernels", "dense us", "converted us"),
        *("speed-up", "bound", "of bound", "end-to-end bound"),
    )
    cells = [
        (
            *(row.model, format_percent(row.sparsity), row.experts, row.tokens, row.variant),
            *(f"{row.dense_us:.0f}", f"{row.moe_us:.0f}"),
            format_ratio(row.speedup) + (" slower than dense" if row.speedup < 1 else ""),
            *(format_ratio(row.bound), format_percent(row.share)),
            format_ratio(row.end_to_end_bound),
        )
        for row in rows
    ]
    console.print(console_table(f"model of {device}, not a measurement", headers, cells))
    console.print(note)
