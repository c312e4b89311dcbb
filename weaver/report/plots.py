"""Plots as SVG text, which browsers and repositories show without any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from weaver.artifacts.bench_results import BenchResult, BenchRow

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 40, 60


def speedup_plot(result: BenchResult) -> str:
    """SVG of the speed-up over dense by number of tokens, prefill and decoding, with its bound."""
    rows = sorted(result.rows, key=lambda row: row.tokens)
    top = max(1.0, *(max(row.speedup, row.bound) for row in rows)) * 1.1
    places = {tokens: i for i, tokens in enumerate(sorted({row.tokens for row in rows}))}

    def x(row: BenchRow) -> float:
        share = places[row.tokens] / (len(places) - 1) if len(places) > 1 else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    header = result.header
    title = f"{header.device}, {header.threads} thread(s), {header.dtype}, {header.level}"
    parts = [
        *_opened(title, "tokens"),
        *(text(x(row), HEIGHT - BOTTOM + 18, str(row.tokens)) for row in rows),
    ]
    step = 0.25 if top < 2.5 else math.ceil(top / 8)
    for i in range(int(top / step) + 1):
        parts.append(line([(LEFT, y(i * step)), (WIDTH - RIGHT, y(i * step))], "#ddd"))
        parts.append(text(LEFT - 24, y(i * step) + 4, f"{i * step:.2f}x"))
    parts.append(line([(LEFT, y(1)), (WIDTH - RIGHT, y(1))], "black"))
    for name, colour in (("prefill", "#1f6fb4"), ("decode", "#c4501b")):
        chosen = [row for row in rows if row.phase == name]
        parts.append(line([(x(row), y(row.bound)) for row in chosen], colour, dashed=True))
        parts.append(line([(x(row), y(row.speedup)) for row in chosen], colour))
        for row in chosen:
            parts.append(
                f'<circle cx="{x(row):.1f}" cy="{y(row.speedup):.1f}" r="4" '
                f'fill="{colour}"><title>{row.speedup:.2f}x</title></circle>'
            )
    parts.append(
        text(WIDTH / 2, 34, "speed-up over dense: blue prefill, red decoding, dashed bound")
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _opened(title: str, x_name: str) -> list[str]:
    """The start of a picture: its size, a white ground, heading and horizontal axis."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 20, title),
        text(WIDTH / 2, HEIGHT - 12, x_name),
    ]


def _within(across: float, up: float) -> tuple[float, float]:
    """Place of a point from its shares of the axes."""
    return (
        LEFT + across * (WIDTH - LEFT - RIGHT),
        HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
    )


COLOURS = ("#1f6fb4", "#c4501b", "#3a8f3a", "#7a4fa3", "#8a6d00", "#555")


def curves_plot(
    title: str, x_name: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """SVG of named curves over one axis, with a legend.

    Args:
        title: heading.
        x_name: what the horizontal axis counts.
        series: points (x, y) of every curve, in the order of x.
    """
    points = [point for curve in series.values() for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        up = (y - low) / (high - low or 1)
        return _within(across, up)

    parts = _opened(title, x_name)
    for i in range(5):
        value, tick = low + i / 4 * (high - low), left + i / 4 * (right - left)
        parts.append(line([place(left, value), place(right, value)], "#ddd"))
        parts.append(text(LEFT - 28, place(left, value)[1] + 4, f"{value:.3g}"))
        parts.append(text(place(tick, low)[0], HEIGHT - BOTTOM + 18, f"{tick:.3g}"))
    for i, (name, curve) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        parts.append(line([place(*point) for point in curve], colour))
        more = f' fill="{colour}"'
        parts.append(text(WIDTH - RIGHT, TOP + 16 * (i + 1), name, anchor="end", more=more))
    return "\n".join([*parts, "</svg>"]) + "\n"


def paths_plot(title: str, x_name: str, paths: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """SVG of named paths of points (x, y), y on a logarithmic axis; names stand at their ends.

    Args:
        title: heading.
        x_name: the horizontal axis.
        paths: points of every path, in their order, y positive.
    """
    points = [point for path in paths.values() for point in path]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = 0.95 * min(xs), 1.05 * max(xs), 0.8 * min(ys), 1.25 * max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return _within((x - left) / (right - left), math.log(y / low) / math.log(high / low))

    parts = _opened(title, x_name)
    for i in range(5):
        y, x = low * (high / low) ** (i / 4), left + i / 4 * (right - left)
        parts.append(line([place(left, y), place(right, y)], "#ddd"))
        parts.append(text(LEFT - 28, place(left, y)[1] + 4, f"{y:.2g}"))
        parts.append(text(place(x, low)[0], HEIGHT - BOTTOM + 18, f"{x:.2f}x"))
    for i, (name, path) in enumerate(paths.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [place(*point) for point in path]
        parts.append(line(places, colour))
        for across, down in places:
            parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{colour}"/>')
        across, down = places[-1]
        before = across > WIDTH * 0.7
        beside = across - 8 if before else across + 8
        more = f' fill="{colour}"'
        parts.append(text(beside, down - 6, name, anchor="end" if before else "start", more=more))
    return "\n".join([*parts, "</svg>"]) + "\n"


def line(points: Sequence[tuple[float, float]], colour: str, *, dashed: bool = False) -> str:
    """SVG of a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}"{dash}/>'


def text(x: float, y: float, words: str, *, anchor: str = "middle", more: str = "") -> str:
    """SVG of words at a place; ``more`` holds further attributes."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{more}>{escape(words)}</text>"
