"""The table of domain affinity, for the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weaver.artifacts.summaries import AffinitySummary


def affinity_table(
    summary: AffinitySummary,
) -> tuple[str, Sequence[str], Sequence[Sequence[object]]]:
    """Title, headers and rows: perplexity by the group pruned by and the group measured on.

    Rows and columns are numbered alike, by expert; ``affinity_experts`` has the names. So that ten
    groups fit into a terminal, a perplexity has a decimal below 100 only.
    """
    order = _by_expert(summary)
    title = (
        f"perplexity pruned by (rows) and measured on (columns) a group, {summary.text} text, "
        f"{summary.tokens} tokens each"
    )
    rows = [
        (place, *(_short(summary.perplexity[i][j]) for j in order))
        for place, i in enumerate(order, start=1)
    ]
    return title, ("", *map(str, range(1, len(order) + 1))), rows


def affinity_experts(summary: AffinitySummary) -> list[str]:
    """A line per expert with the numbers and names of its groups."""
    members: dict[int, list[str]] = {}
    for place, group in enumerate(_by_expert(summary), start=1):
        expert = summary.experts[group]
        members.setdefault(expert, []).append(f"{place} {summary.groups[group]}")
    return [f"  expert {expert}: {', '.join(names)}" for expert, names in members.items()]


def _by_expert(summary: AffinitySummary) -> list[int]:
    experts = summary.experts
    return sorted(range(len(experts)), key=lambda group: (experts[group], group))


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
