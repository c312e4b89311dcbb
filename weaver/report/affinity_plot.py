"""Domain affinity as a heat map beside the tree of its clusters, as SVG."""

from __future__ import annotations

from typing import Any

from scipy.cluster.hierarchy import dendrogram

from weaver.artifacts.affinity import Affinity
from weaver.report.plots import line, text

CELL, NAMES, TREE, TOP = 34, 190, 160, 60
# Of the tree's branches, by expert, repeated where there are more.
COLOURS = ("#1f6fb4", "#c4501b", "#2f8f4e", "#8a4fb0", "#b0892a", "#3f9aa6", "#b03a6b", "#666")


def affinity_plot(affinity: Affinity) -> str:
    """SVG of the normalised matrix in the order of the tree's leaves, and the tree.

    Rows are what a model was pruned by, columns what it was measured on; 1.00 is the best model of
    a column. The colour of a name is its expert.
    """
    tree: Any = dendrogram(affinity.linkage_M4.numpy(), no_plot=True)
    order: list[int] = tree["leaves"]
    groups, size = affinity.groups, len(order) * CELL
    width, height = NAMES + size + TREE + 20, TOP + size + NAMES
    lowest = float(affinity.normalised_GG.min())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(width / 2, 20, f"perplexity on {affinity.text} text, best of a column over each"),
        text(width / 2, 36, "rows: pruned by; columns: measured on; right: clusters, 1 - r"),
    ]
    for row, i in enumerate(order):
        y, colour = TOP + row * CELL, COLOURS[int(affinity.experts_G[i]) % len(COLOURS)]
        parts.append(_name(groups[i], NAMES - 8, y + CELL / 2 + 4, colour))
        down = TOP + size + 8
        x = NAMES + row * CELL + CELL / 2 + 4
        parts.append(_name(groups[i], x, down, colour, turned=True))
        for column, j in enumerate(order):
            value = float(affinity.normalised_GG[i, j])
            parts.append(_cell(NAMES + column * CELL, y, value, lowest))
    farthest = max(1e-12, float(affinity.linkage_M4[:, 2].max()))
    for places, distances in zip(tree["icoord"], tree["dcoord"], strict=True):
        # scipy puts leaf k at 10 k + 5.
        parts.append(
            line(
                [
                    (NAMES + size + 8 + d / farthest * (TREE - 10), TOP + p / 10 * CELL)
                    for p, d in zip(places, distances, strict=True)
                ],
                "black",
            )
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: float, y: float, value: float, lowest: float) -> str:
    """White at the lowest value of the matrix, blue at 1."""
    share = (value - lowest) / (1.0 - lowest) if lowest < 1.0 else 1.0
    red, green = round(255 - 190 * share), round(255 - 130 * share)
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{CELL - 1}" height="{CELL - 1}" '
        f'fill="rgb({red},{green},255)"/>' + text(x + CELL / 2, y + CELL / 2 + 4, f"{value:.2f}")
    )


def _name(name: str, x: float, y: float, colour: str, *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return text(x, y, name, anchor="end", more=f' fill="{colour}"{turn}')
