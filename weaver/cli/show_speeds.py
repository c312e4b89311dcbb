"""The table that ``weaver bench`` prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from weaver.report.speeds import bench_columns, bench_title
from weaver.report.tables import console_table

# Columns of a terminal that shows the whole table of a benchmark.
WIDE_ENOUGH = 150


def show_bench(console: Console, summary: dict[str, Any]) -> None:
    """Dense against converted, a row per number of tokens."""
    title = bench_title(summary["header"])
    narrow = console.width < WIDE_ENOUGH
    console.print(console_table(title, *bench_columns(summary["rows"], narrow=narrow)))
