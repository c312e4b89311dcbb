"""Speed-up plots: well-formed, all rows at the place that their values have, nothing cut off."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from weaver.artifacts.bench_results import BenchHeader, BenchResult, BenchRow
from weaver.report.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    curves_plot,
    paths_plot,
    speedup_plot,
)

SVG = "{http://www.w3.org/2000/svg}"
GRID, ONE = "#ddd", "black"


def row(tokens: int, speedup: float, bound: float = 1.25, phase: str = "prefill") -> BenchRow:
    times: dict[str, Any] = {
        f"{name}_{quantile}ms": value
        for name, value in (("dense", speedup), ("moe", 1.0))
        for quantile in ("p10_", "", "p90_")
    }
    return BenchRow(
        tokens=tokens,
        phase="decode" if phase == "decode" else "prefill",
        speedup=speedup,
        bound=bound,
        bound_share=speedup / bound,
        dense_tokens_per_second=1.0,
        moe_tokens_per_second=1.0,
        **times,
    )


def plot(*rows: BenchRow, device: str = "a processor") -> ElementTree.Element:
    header = BenchHeader(device=device, threads=2, dtype="bfloat16", level="layer")
    return ElementTree.fromstring(speedup_plot(BenchResult(header=header, rows=rows)))


def circles(svg: ElementTree.Element) -> list[tuple[float, float, str]]:
    """Centres and titles."""
    return [
        (float(each.attrib["cx"]), float(each.attrib["cy"]), each.findtext(f"{SVG}title") or "")
        for each in svg.iter(f"{SVG}circle")
    ]


def lines(svg: ElementTree.Element, *, dashed: bool) -> list[tuple[str, list[tuple[float, float]]]]:
    """Colour and points of the lines."""
    found = []
    for each in svg.iter(f"{SVG}polyline"):
        if ("stroke-dasharray" in each.attrib) == dashed:
            pairs = [pair.split(",") for pair in each.attrib["points"].split()]
            found.append((each.attrib["stroke"], [(float(x), float(y)) for x, y in pairs]))
    return found


def test_places_by_hand() -> None:
    svg = plot(row(1, 1.5, 2.0), row(128, 1.0, 1.25), row(512, 0.5, 1.25), row(32, 1.0, 2.0))
    xs, ys, titles = zip(*circles(svg), strict=True)
    # 1, 32, 128, 512 at equal distances over 560; the top is at 2.0 * 1.1, over 260.
    assert xs == pytest.approx((60, 60 + 560 / 3, 60 + 1120 / 3, 620), abs=0.05)
    heights = [260 * speedup / 2.2 for speedup in (1.5, 1.0, 1.0, 0.5)]
    assert ys == pytest.approx([300 - height for height in heights], abs=0.05)
    assert titles == ("1.50x", "1.00x", "1.00x", "0.50x")
    assert (WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM) == (640, 360, 60, 20, 40, 60)
    texts = [each.text for each in svg.iter(f"{SVG}text")]
    assert texts[0] == "a processor, 2 thread(s), bfloat16, layer"
    assert texts[2:6] == ["1", "32", "128", "512"]


def test_a_circle_and_a_point_of_the_bound_per_row() -> None:
    svg = plot(
        row(512, 1.2),
        row(1, 0.8),
        row(1, 1.1, 1.33, phase="decode"),
        row(512, 1.1),  # another layer at the same number of tokens
    )
    assert sorted(title for _, _, title in circles(svg)) == ["0.80x", "1.10x", "1.10x", "1.20x"]
    bounds = dict(lines(svg, dashed=True))
    assert sorted(len(points) for points in bounds.values()) == [1, 3]
    fills = [each.attrib["fill"] for each in svg.iter(f"{SVG}circle")]
    # Prefill and decoding have colours of their own, which their bounds share.
    assert len(set(fills)) == 2
    assert {colour: fills.count(colour) for colour in fills} == {
        colour: len(points) for colour, points in bounds.items()
    }


def test_the_bound_is_above_what_stays_below_it() -> None:
    svg = plot(row(1, 0.9, 1.3), row(64, 1.2, 1.25), row(512, 1.3, 1.2))
    ((_, bound),) = [each for each in lines(svg, dashed=True) if each[1]]
    # Up is towards 0; the last measurement is beyond its bound, and is drawn so.
    above = [y < cy for (_, y), (_, cy, _) in zip(bound, circles(svg), strict=True)]
    assert above == [True, True, False]


@pytest.mark.parametrize(("speedup", "bound"), [(0.2, 0.9), (0.9, 1.33), (1.7, 1.2), (5.0, 6.0)])
def test_nothing_is_outside_and_the_line_at_one_is_there(speedup: float, bound: float) -> None:
    svg = plot(row(1, speedup, bound), row(2048, speedup / 2, bound))
    points = [(x, y) for x, y, _ in circles(svg)]
    for dashed in (False, True):
        points += [point for _, each in lines(svg, dashed=dashed) for point in each]
    assert len(points) >= 6
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)
    assert all(
        0 <= float(each.attrib["x"]) <= WIDTH and 0 <= float(each.attrib["y"]) <= HEIGHT
        for each in svg.iter(f"{SVG}text")
    )
    ((_, one),) = [each for each in lines(svg, dashed=False) if each[0] == ONE]
    y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) / (1.1 * max(1.0, speedup, bound))
    assert [x for x, _ in one] == [LEFT, WIDTH - RIGHT]
    assert [height for _, height in one] == pytest.approx([y, y], abs=0.05)
    labels = {text: y for y, text in axis(svg)}
    assert labels["1.00x"] == pytest.approx(y + 4, abs=0.11)


def axis(svg: ElementTree.Element) -> list[tuple[float, str]]:
    """Heights and texts of the ratios left of the plot."""
    return [
        (float(each.attrib["y"]), each.text or "")
        for each in svg.iter(f"{SVG}text")
        if float(each.attrib["x"]) < LEFT and (each.text or "").endswith("x")
    ]


@pytest.mark.parametrize(
    ("bound", "labels"),
    [
        (1.0, ["0.00x", "0.25x", "0.50x", "0.75x", "1.00x"]),
        (4.0, ["0.00x", "1.00x", "2.00x", "3.00x", "4.00x"]),
        (12.0, ["0.00x", "2.00x", "4.00x", "6.00x", "8.00x", "10.00x", "12.00x"]),
    ],
)
def test_the_axis_has_few_labels_and_a_grid(bound: float, labels: list[str]) -> None:
    svg = plot(row(1, 0.5, bound), row(8, 0.5, bound))
    assert [text for _, text in axis(svg)] == labels
    grid = [points for colour, points in lines(svg, dashed=False) if colour == GRID]
    heights = [y - 4 for y, _ in axis(svg)]
    assert [points[0][1] for points in grid] == pytest.approx(heights, abs=0.11)


def test_a_single_row_is_in_the_middle() -> None:
    ((x, _, title),) = circles(plot(row(1, 0.75, phase="decode")))
    assert (x, title) == (340.0, "0.75x")


def test_the_name_of_the_device_is_escaped() -> None:
    svg = plot(row(1, 1.0), device='<b>"R" & D</b>')
    texts = [each.text for each in svg.iter(f"{SVG}text")]
    assert texts[0] == '<b>"R" & D</b>, 2 thread(s), bfloat16, layer'
    assert not list(svg.iter(f"{SVG}b"))


def test_curves_share_their_axes() -> None:
    series = {"a & b": [(0, 4.0), (10, 2.0)], "flat": [(0, 3.0), (10, 3.0)]}
    drawn = curves_plot("held-out <loss>", "step", series)
    root = ElementTree.fromstring(drawn)
    lines = [
        [tuple(map(float, place.split(","))) for place in each.attrib["points"].split()]
        for each in root.iter(f"{SVG}polyline")
    ]
    falling, flat = lines[-2:]
    assert falling[0][0] == flat[0][0] < falling[1][0] == flat[1][0]
    assert falling[0][1] < flat[0][1] == flat[1][1] < falling[1][1]  # SVG counts downward
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert {"held-out <loss>", "step", "a & b", "flat", "4", "2", "10"} <= set(words)


def test_one_point_is_a_plot() -> None:
    ElementTree.fromstring(curves_plot("one", "step", {"only": [(5, 1.0)]}))


def test_paths_end_in_their_names_on_a_logarithmic_axis() -> None:
    paths = {"a": [(1.0, 0.1), (1.1, 1.0), (1.2, 10)], "b": [(1.05, 2.0)]}
    root = ElementTree.fromstring(paths_plot("KL & speed", "speed-up", paths))
    places = [
        (float(each.attrib["cx"]), float(each.attrib["cy"]))
        for each in root
        if each.tag.endswith("circle")
    ]
    (_, first), (_, second), (last, third), _ = places
    assert first - second == pytest.approx(second - third, abs=0.2)
    texts = {each.text: each for each in root if each.tag.endswith("text")}
    assert {"KL & speed", "speed-up", "a", "b"} <= set(texts)
    assert float(texts["a"].attrib["x"]) == pytest.approx(last - 8, abs=0.2)
