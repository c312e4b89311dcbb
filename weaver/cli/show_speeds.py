"""The table that ``weaver bench`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from weaver.report.speeds import bench_columns, bench_title
from weaver.report.tables import console_table

if TYPE_CHECKING:
    from weaver.artifacts.bench_results import BenchResult

# Columns of a terminal that shows the whole table of a benchmark.
WIDE_ENOUGH = 150


def show_bench(console: Console, result: BenchResult) -> None:
    """Dense against converted, a row per number of tokens."""
    title = bench_title(result.header.model_dump())
    narrow = console.width < WIDE_ENOUGH
    console.print(
        console_table(
            title, *bench_columns([row.model_dump() for row in result.rows], narrow=narrow)
        )
    )
