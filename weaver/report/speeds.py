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
_OF_MODELS = ("phase", "dense tokens/s", "converted tokens/s")
# Columns that a narrow terminal has no room for.
_WIDE = ("dense by", "dense tokens/s", "of bound", "path", "routing ms")


def bench_title(header: dict[str, Any]) -> str:
    """Title of a table of times, from the fields of a ``BenchHeader``."""
    # Results of earlier versions have less.
    peak, clock = header.get("peak_memory_bytes"), header.get("clock_mhz")
    return (
        f"{header['device']}, "
        + (f"{clock:.0f} MHz, " if clock else "")
        + f"{header['threads']} thread(s), {header['dtype']}, "
        f"torch {header['versions']['torch']}; level {header.get('level', 'model')}, "
        f"{header.get('routing', 'real')} routing; medians (p10-p90)"
        + (f"; peak memory {format_bytes(peak)}" if peak else "")
    )


def bench_columns(
    rows: Sequence[Row], *, narrow: bool = False
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headers and cells of the rows of a ``BenchResult``.

    Args:
        rows: their fields.
        narrow: leave out the spread of times and what is of interest to few.
    """
    # The path is known where single FFNs were timed.
    single = any(row.get("path") is not None for row in rows)
    left_out = {*(_OF_MODELS if single else ()), *(_WIDE if narrow else ())}
    columns = _columns(narrow=narrow)
    headers = [
        name
        for name in columns
        if name not in _OPTIONAL or any(row.get(_OPTIONAL[name]) is not None for row in rows)
        if name not in left_out
    ]
    return headers, [tuple(columns[name](row) for name in headers) for row in rows]


def _columns(*, narrow: bool) -> dict[str, Callable[[Row], str]]:
    def milliseconds(which: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            low, middle, high = (row[f"{which}_{key}ms"] for key in ("p10_", "", "p90_"))
            return f"{middle:.2f}" + ("" if narrow else f" ({low:.2f}-{high:.2f})")

        return cell

    def optional(key: str, form: str) -> Callable[[Row], str]:
        return lambda row: "-" if row[key] is None else format(row[key], form)

    return {
        "layer": lambda row: str(row["layer"]),
        "phase": lambda row: str(row["phase"]),
        "tokens": lambda row: str(row["tokens"]),
        "dense ms": milliseconds("dense"),
        "dense by": lambda row: str(row["dense_variant"]),
        "converted ms": milliseconds("moe"),
        "dense tokens/s": lambda row: f"{row['dense_tokens_per_second']:.1f}",
        "converted tokens/s": lambda row: f"{row['moe_tokens_per_second']:.1f}",
        "speed-up": _speedup,
        "bound": lambda row: format_ratio(row["bound"]),
        "of bound": lambda row: format_percent(row["bound_share"]),
        "path": lambda row: str(row["path"]),
        "grouped_mm ms": optional("grouped_mm_ms", ".2f"),
        "routing ms": optional("routing_ms", ".3f"),
        "relative error": optional("relative_error", ".1e"),
    }


def _speedup(row: Row) -> str:
    return format_ratio(row["speedup"]) + (" slower than dense" if row["speedup"] < 1 else "")
