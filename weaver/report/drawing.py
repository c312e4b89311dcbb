"""Pictures for HTML pages: matplotlib's SVG, whose colours a style sheet sets.

Colours are drawn as marks that no picture would have, and replaced by variables of the style sheet:
one drawing serves a light page, a dark one and paper. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from weaver.report.tables import format_number

# 480 by 330 units, near the size at which a phone shows it: its text need not shrink much.
WIDTH, HEIGHT, POINTS = 5.0, 3.4, 96
INK, RULE = "#0a0b0c", "#1a1b1c"
SERIES = tuple(f"#f0000{i}" for i in range(8))
# Lines that lie on each other, and colours that look alike, are told apart by their dashes.
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (8, 1.5, 2, 1.5)), (0, (2.5, 1)))
MARKERS = "osD^vPX*"

Point = tuple[float, float]


@dataclass(frozen=True)
class Axes:
    """Names, with units, and ranges of the axes of a picture.

    Args:
        x, y: what they count.
        x_log, y_log: whether they are logarithmic.
        y_range: lowest and highest y; None as the values are.
    """

    x: str
    y: str
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float | None, float | None] | None = None


@dataclass(frozen=True)
class Picture:
    """A picture and what a reader needs with it.

    Args:
        title: heading.
        reading: one sentence on how to read it.
        svg: the drawing.
        axes: as they are named in it.
        headers, rows: its numbers as a table; no rows where a table would be too long.
    """

    title: str
    reading: str
    svg: str
    axes: Axes
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Curve:
    """Points of a line; ``reference`` lines are dashed and thin, in the colour of ``like``."""

    points: Sequence[Point]
    reference: bool = False
    like: str | None = None


def curves(
    title: str, axes: Axes, reading: str, series: Mapping[str, Curve], *, marks: bool = False
) -> Picture:
    """Lines over a common axis, with a legend. One without points is left out, its colour unused.

    Args:
        title: heading.
        axes: of the picture.
        reading: how to read it.
        series: named lines.
        marks: whether every point has a mark.
    """
    with _figure(title) as (figure, plot, svg):
        styles = _styles([name for name, curve in series.items() if curve.like is None])
        for name, curve in series.items():
            if not curve.points:
                continue
            style = dict(styles[curve.like or name])
            if curve.reference:
                style |= {"linestyle": ":", "linewidth": 1.0, "marker": ""}
            elif not marks:
                style |= {"marker": ""}
            plot.plot(*zip(*curve.points, strict=True), label=name, **style)
        _frame(plot, axes)
        if len(series) > 1:
            _legend(figure, plot)
    drawn = {name: curve for name, curve in series.items() if curve.points}
    return Picture(title, reading, svg[0], axes, *_table(axes.x, drawn))


def points(
    title: str,
    axes: Axes,
    reading: str,
    places: Mapping[str, Point | None],
    *,
    best: Sequence[str] = (),
    reference: Mapping[str, Point] | None = None,
) -> Picture:
    """Named points, those that nothing beats joined by a line.

    Args:
        title: heading.
        axes: of the picture.
        reading: how to read it.
        places: named points; one that is None is left out, its colour unused.
        best: names of those on the line.
        reference: other named points, such as the dense model, drawn as open marks.
    """
    with _figure(title) as (figure, plot, svg):
        there = {name: place for name, place in places.items() if place is not None}
        line = sorted(there[name] for name in best)
        if len(line) > 1:
            plot.plot(*zip(*line, strict=True), color=RULE, linewidth=2, zorder=1)
        styles = _styles(list(places))
        for name, place in there.items():
            style = styles[name]
            plot.plot(*place, label=name, **(style | {"linestyle": "", "markersize": 8}))
        for name, place in (reference or {}).items():
            plot.plot(
                *place, label=name, marker="o", linestyle="", color=INK, fillstyle="none", zorder=3
            )
        _frame(plot, axes)
        _legend(figure, plot)
    rows = [(name, *map(format_number, place)) for name, place in there.items()]
    return Picture(title, reading, svg[0], axes, ("run", axes.x, axes.y), tuple(rows))


def bars(title: str, axes: Axes, reading: str, parts: Mapping[str, Mapping[str, float]]) -> Picture:
    """Horizontal bars, each of named parts in a row.

    Args:
        title: heading.
        axes: x is what the parts count.
        reading: how to read it.
        parts: by bar, its parts.
    """
    names = list(dict.fromkeys(name for bar in parts.values() for name in bar))
    with _figure(title, height=1.6 + 0.32 * len(parts)) as (figure, plot, svg):
        start = [0.0] * len(parts)
        for name, style in _styles(names).items():
            lengths = [bar.get(name, 0.0) for bar in parts.values()]
            plot.barh(list(parts), lengths, left=start, label=name, color=style["color"])
            start = [a + b for a, b in zip(start, lengths, strict=True)]
        plot.invert_yaxis()
        _frame(plot, axes)
        _legend(figure, plot)
    rows = [
        (bar, *(format_number(values.get(name, 0.0)) for name in names))
        for bar, values in parts.items()
    ]
    return Picture(title, reading, svg[0], axes, ("", *names), tuple(rows))


@dataclass(frozen=True)
class HeatScale:
    """Meaning and range of the colours of a heat map.

    Args:
        name: what they show, with its unit.
        low, high: their range.
        diverging: whether the middle means "as usual".
        cells: how a value stands in its cell; None leaves cells empty.
    """

    name: str
    low: float
    high: float
    diverging: bool = False
    cells: Callable[[float], str] | None = None


def heat_map(
    title: str,
    axes: Axes,
    reading: str,
    values: Sequence[Sequence[float]],
    scale: HeatScale,
    *,
    x_names: Sequence[str] | None = None,
    y_names: Sequence[str] | None = None,
    tree: Any = None,
) -> Picture:
    """A grid of coloured cells; NaN is grey.

    Args:
        title: heading.
        axes: of the picture.
        reading: how to read it.
        values: by row, from above, the values of its columns.
        scale: of the colours.
        x_names, y_names: of columns and rows; their numbers if left out.
        tree: a linkage of the rows as scipy has it, drawn beside them; the rows are in the order of
            its leaves.
    """
    rows, columns = len(values), len(values[0])
    height = max(HEIGHT, 1.5 + (0.16 if y_names else 0.11) * rows + (1.0 if x_names else 0.0))
    with _figure(title, height=height) as (figure, plot, svg):
        colours = "PuOr" if scale.diverging else "viridis"
        mesh = plot.pcolormesh(
            _array(values), cmap=colours, vmin=scale.low, vmax=scale.high, linewidth=0
        )
        plot.invert_yaxis()
        plot.set_facecolor(RULE)
        _ticks(plot, columns, rows, x_names, y_names)
        if scale.cells is not None:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    dark = (value - scale.low) / (scale.high - scale.low) < 0.5
                    colour = "#ffffff" if dark else "#000000"
                    words = scale.cells(value)
                    plot.text(
                        j + 0.5, i + 0.5, words, ha="center", va="center", color=colour, fontsize=7
                    )
        if tree is not None:
            _tree(plot, tree)
        bar = figure.colorbar(mesh, ax=plot, fraction=0.05, pad=0.02)
        bar.set_label(scale.name)
        bar.outline.set_visible(False)
        _frame(plot, axes, grid=False)
    return Picture(title, reading, svg[0], axes)


def _tree(plot: Any, linkage: Any) -> None:
    from scipy.cluster.hierarchy import dendrogram

    beside = plot.inset_axes((1.01, 0.0, 0.18, 1.0))
    dendrogram(linkage, ax=beside, orientation="right", no_labels=True, color_threshold=0)
    for line in beside.collections:
        line.set_color(INK)
    beside.invert_yaxis()
    beside.set_axis_off()


def _array(values: Sequence[Sequence[float]]) -> Any:
    import numpy

    return numpy.ma.masked_invalid(numpy.array(values, dtype=float))


def _ticks(
    plot: Any,
    columns: int,
    rows: int,
    x_names: Sequence[str] | None,
    y_names: Sequence[str] | None,
) -> None:
    for axis, count, names in ((plot.xaxis, columns, x_names), (plot.yaxis, rows, y_names)):
        step = 1 if names else max(1, math.ceil(count / 8))
        chosen = range(0, count, step)
        words = [_short(names[i]) if names else str(i) for i in chosen]
        axis.set_ticks([i + 0.5 for i in chosen], words)
    if x_names:
        plot.tick_params("x", rotation=90)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:14]}…{name[-9:]}"


@contextmanager
def _figure(title: str, height: float = HEIGHT) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure, its axes, and a list that holds the SVG when the block is left."""
    # It takes half a second to import, and few commands need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        # A name may hold a dollar sign.
        "text.parse_math": False,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        # Names of clip paths would else be random, and collide between pictures of one page.
        "svg.hashsalt": title,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), RULE),
    }
    drawn: list[str] = []
    with rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot(), drawn
        output = io.StringIO()
        # The first pass makes room for labels whose width it has not yet seen.
        figure.draw_without_rendering()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(output, format="svg", metadata=metadata)
    drawn.append(_inline(output.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """The drawing as a part of a page: without prologue, fixed size and fixed colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 sans-serif", svg)
    svg = re.sub(r' (xmlns:xlink|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    for mark, name in ((INK, "ink"), (RULE, "rule"), *((s, f"s{i}") for i, s in enumerate(SERIES))):
        svg = svg.replace(mark, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "color": SERIES[i % len(SERIES)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": 4,
            "linewidth": 1.6,
        }
        for i, name in enumerate(names)
    }


def _frame(plot: Any, axes: Axes, *, grid: bool = True) -> None:
    plot.set_xlabel(axes.x)
    plot.set_ylabel(axes.y)
    for is_log, axis, low_high in (
        (axes.x_log, plot.xaxis, plot.get_xlim),
        (axes.y_log, plot.yaxis, plot.get_ylim),
    ):
        if is_log:
            _logarithmic(axis, low_high)
    if axes.y_range is not None:
        plot.set_ylim(*axes.y_range)
    if grid:
        plot.grid(linewidth=0.6)
        plot.set_axisbelow(True)


def _logarithmic(axis: Any, low_high: Callable[[], Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = low_high()
    # Few decades hold few powers of ten.
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, plot: Any) -> None:
    names = plot.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, names)) > 24 else 2
    figure.legend(
        *plot.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
    )


def _table(
    x_name: str, series: Mapping[str, Curve]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """A row per x, a column per line; none for more rows than anybody reads."""
    places = sorted({x for curve in series.values() for x, _ in curve.points})
    if len(places) > 200:
        return (), ()
    values = {name: dict(curve.points) for name, curve in series.items()}
    rows = tuple(
        (
            f"{x:g}",
            *(format_number(each[x]) if x in each else "" for each in values.values()),
        )
        for x in places
    )
    return (x_name, *series), rows
