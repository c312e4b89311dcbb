"""One layer of a run in the terminal: its figures, and where it stands among the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weaver.report.tables import format_count, format_number, format_percent

BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float | None = None) -> str:
    """Values as blocks of eight heights.

    Args:
        values: at least one.
        low: that of the lowest block; the lowest value if left out.
    """
    bottom, high, steps = min(values) if low is None else low, max(values), len(BLOCKS) - 1
    return "".join(BLOCKS[round(steps * (v - bottom) / ((high - bottom) or 1.0))] for v in values)


@dataclass(frozen=True)
class LayerFacts:
    """A measure of every layer.

    Args:
        name: with its unit.
        values: by layer.
        percent: whether they are shares of 1.
    """

    name: str
    values: Mapping[int, float]
    percent: bool = False


def layer_rows(layer: int, facts: Sequence[LayerFacts]) -> list[tuple[str, str, str, str]]:
    """Per measure: its name, the layer's value, its rank from above, and a line over all layers.

    The line goes from the lowest value to the highest; the layer stands between bars.

    Args:
        layer: of the model, from 0.
        facts: what was measured; one that the layer lacks has no row.
    """
    rows = []
    for each in facts:
        if layer not in each.values:
            continue
        value = each.values[layer]
        form = format_percent if each.percent else format_number
        place = sorted(each.values.values(), reverse=True).index(value) + 1
        line = sparkline(list(each.values.values()))
        at = list(each.values).index(layer)
        marked = f"{line[:at]}│{line[at]}│{line[at + 1 :]}"
        rows.append((each.name, form(value), f"{place} of {len(each.values)}", marked))
    return rows


def spread_rows(spreads: Mapping[str, Sequence[float]]) -> list[tuple[str, str, str]]:
    """Per list of values inside the layer: name, how many, range, and a line from 0 up."""
    return [
        (
            f"{name} ({format_count(len(values))})",
            f"{format_number(min(values))} to {format_number(max(values))}",
            sparkline(values, low=0.0),
        )
        for name, values in spreads.items()
        if values
    ]
