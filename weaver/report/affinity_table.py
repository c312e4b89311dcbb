"""The table of domain affinity, for the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weaver.report.tables import format_number


def affinity_table(
    summary: dict[str, Any],
) -> tuple[str, Sequence[str], Sequence[Sequence[object]]]:
    """Title, headers and rows: perplexity by the group pruned by and the group measured on.

    Rows are ordered by expert; columns, in the same order, are numbered as the rows are.
    """
    experts, names = summary["experts"], summary["groups"]
    order = sorted(range(len(names)), key=lambda group: (experts[group], group))
    title = (
        f"perplexity of the model pruned by a row's group, on {summary['text']} text of a column's "
        f"({summary['tokens']} tokens each)"
    )
    headers = ("", "group", "expert", *(str(place + 1) for place in range(len(order))))
    rows = [
        (
            place + 1,
            names[i],
            experts[i],
            *(format_number(summary["perplexity"][i][j]) for j in order),
        )
        for place, i in enumerate(order)
    ]
    return title, headers, rows
