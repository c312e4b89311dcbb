"""The table of a benchmark, for the console and for documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weaver.report.tables import format_bytes, format_percent, format_ratio

Row = dict[str, Any]

# What was not measured in any row has no column.
_OPTIONAL = {
    "layer": "layer",
    "path": "path",
    "dense by": "dense_variant",
    "grouped_mm ms": "grouped_mm_ms",
    "routing ms": "routing_ms",
    "relative error": "relative_error",
}
_OF_MODELS = ("dense tokens/s", "converted tokens/s")


def bench_title(header: dict[str, Any]) -> str:
    """Where and how the times were taken, from the fields of a ``BenchHeader``."""
    peak, clock = header["peak_memory_bytes"], header["clock_mhz"]
    return (
        f"{header['device']}, "
        + (f"{clock:.0f} MHz, " if clock else "")
        + f"{header['threads']} thread(s), {header['dtype']}, "
        f"torch {header['versions']['torch']}; level {header['level']}, "
        f"{header['routing']} routing; medians (p10-p90)"
        + (f"; peak memory {format_bytes(peak)}" if peak else "")
    )


def bench_columns(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers and cells of the rows of a ``BenchResult``."""
    # The path is known where single FFNs were timed; tokens per second are of interest elsewhere.
    single = any(row["path"] is not None for row in rows)
    headers = [
        name
        for name in _COLUMNS
        if name not in _OPTIONAL or any(row[_OPTIONAL[name]] is not None for row in rows)
        if not (single and name in _OF_MODELS)
    ]
    return headers, [tuple(_COLUMNS[name](row) for name in headers) for row in rows]


def _milliseconds(row: Row, which: str) -> str:
    low, middle, high = (row[f"{which}_{key}ms"] for key in ("p10_", "", "p90_"))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _optional(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "-" if row[key] is None else format(row[key], form)


def _speedup(row: Row) -> str:
    return format_ratio(row["speedup"]) + (" slower than dense" if row["speedup"] < 1 else "")


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "layer": lambda row: str(row["layer"]),
    "phase": lambda row: str(row["phase"]),
    "tokens": lambda row: str(row["tokens"]),
    "dense ms": lambda row: _milliseconds(row, "dense"),
    "dense by": lambda row: str(row["dense_variant"]),
    "converted ms": lambda row: _milliseconds(row, "moe"),
    "dense tokens/s": lambda row: f"{row['dense_tokens_per_second']:.1f}",
    "converted tokens/s": lambda row: f"{row['moe_tokens_per_second']:.1f}",
    "speed-up": _speedup,
    "bound": lambda row: format_ratio(row["bound"]),
    "of bound": lambda row: format_percent(row["bound_share"]),
    "path": lambda row: str(row["path"]),
    "grouped_mm ms": _optional("grouped_mm_ms", ".2f"),
    "routing ms": _optional("routing_ms", ".3f"),
    "relative error": _optional("relative_error", ".1e"),
}
