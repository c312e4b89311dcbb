"""Domain affinity as a plot and as a table."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from weaver.algorithms.affinity import column_normalised, correlation_clusters, row_correlation
from weaver.artifacts.affinity import Affinity
from weaver.artifacts.summaries import AffinitySummary
from weaver.report.affinity_plot import CELL, COLOURS, NAMES, TOP, affinity_plot
from weaver.report.affinity_table import affinity_experts, affinity_table

SVG = "{http://www.w3.org/2000/svg}"
PERPLEXITY_GG = torch.tensor([[10.0, 40.0, 12.0], [20.0, 30.0, 24.0], [10.0, 38.0, 11.0]])


@pytest.fixture
def affinity() -> Affinity:
    """Three groups, of which the first and the last are one expert."""
    normalised_GG = column_normalised(PERPLEXITY_GG.double())
    correlation_GG = row_correlation(normalised_GG)
    tree_M4, experts_G = correlation_clusters(correlation_GG, 2)
    return Affinity(
        PERPLEXITY_GG.double(),
        normalised_GG,
        correlation_GG,
        tree_M4,
        experts_G,
        json.dumps(["law", "<code>", "sermons"]),
        "held-out",
        63,
    )


def test_the_heat_map_has_every_value_in_the_order_of_the_tree(affinity: Affinity) -> None:
    assert affinity.experts_G.tolist() == [0, 1, 0]
    root = ElementTree.fromstring(affinity_plot(affinity))
    cells = {
        (float(rect.attrib["x"]), float(rect.attrib["y"])): rect.attrib["fill"]
        for rect in root.findall(f"{SVG}rect")[1:]
    }
    assert len(cells) == 9
    words = {
        (float(text.attrib["x"]), float(text.attrib["y"])): text
        for text in root.findall(f"{SVG}text")
    }
    names = [words[NAMES - 8, TOP + row * CELL + CELL / 2 + 4].text for row in range(3)]
    assert sorted(filter(None, names)) == ["<code>", "law", "sermons"]
    # Leaves of one cluster are neighbours.
    assert abs(names.index("law") - names.index("sermons")) == 1
    groups = {name: index for index, name in enumerate(affinity.groups)}
    for row, name in enumerate(names):
        assert name is not None
        place = words[NAMES - 8, TOP + row * CELL + CELL / 2 + 4]
        assert place.attrib["fill"] == COLOURS[int(affinity.experts_G[groups[name]])]
        for column, other in enumerate(names):
            assert other is not None
            value = float(affinity.normalised_GG[groups[name], groups[other]])
            x, y = float(NAMES + column * CELL), float(TOP + row * CELL)
            assert words[x + CELL / 2, y + CELL / 2 + 4].text == f"{value:.2f}"
            # The best of a column is the darkest.
            assert (cells[x, y] == "rgb(65,125,255)") == (value == 1.0)
    # Two merges, the last of which reaches furthest.
    lines = [line.attrib["points"] for line in root.findall(f"{SVG}polyline")]
    assert len(lines) == 2
    size = [float(part) for part in root.attrib["viewBox"].split()]
    for points in lines:
        for point in points.split():
            x, y = (float(value) for value in point.split(","))
            assert NAMES + 3 * CELL < x < size[2]
            assert TOP < y < TOP + 3 * CELL


def test_the_table_is_ordered_by_expert() -> None:
    values = {"groups": ("law", "code", "sermons"), "experts": (0, 1, 0), "text": "held-out"}

    def summary(perplexity_GG: Tensor) -> AffinitySummary:
        found = {**values, "perplexity": perplexity_GG.tolist(), "tokens": 63}
        return AffinitySummary.model_validate(found)

    title, headers, rows = affinity_table(summary(10 * PERPLEXITY_GG))
    assert "held-out text, 63 tokens each" in title
    assert headers == ("", "1", "2", "3")
    assert rows == [
        (1, "100", "120", "400"),
        (2, "100", "110", "380"),
        (3, "200", "240", "300"),
    ]
    low = affinity_table(summary(PERPLEXITY_GG))[2]
    assert low[0] == (1, "10.0", "12.0", "40.0")
    experts = affinity_experts(summary(PERPLEXITY_GG))
    assert experts == ["  expert 0: 1 law, 2 sermons", "  expert 1: 3 code"]
