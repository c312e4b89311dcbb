"""The report: what its page holds, that it needs nothing else, and how it looks in a browser."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from tiny_runs import run_config, run_stages
from typer.testing import CliRunner, Result

from weaver.artifacts.store import read_record
from weaver.artifacts.types import LayerProfile
from weaver.cli.app import app
from weaver.report.drawing import Axes, Curve, curves
from weaver.report.layer_view import sparkline
from weaver.report.page import report_page, sections
from weaver.report.pictures import quality_pictures
from weaver.report.run_facts import RunFacts
from weaver.report.tables import format_percent
from weaver.rundir.inputs import open_calibration
from weaver.stages.report import RATE_EDGES, neuron_facts, read_runs

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def run_dirs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A routed run with everything measured, a static one that was trained, one by groups."""
    folder = tmp_path_factory.mktemp("report")
    sections_of: dict[str, dict[str, Any]] = {
        "weave": {
            "partition": {"method": "weave", "allocation": "fisher"},
            "assemble": {"smoke_test": True},
            "eval": {"router": True},
        },
        "flap": {
            "partition": {"method": "flap", "num_experts": None},
            "finetune": {"steps": 2, "sequence_length": 32, "batch_size": 1},
        },
        "dive": {
            "calibrate": {"groups": True, "tokens": 1024},
            "partition": {"method": "dive", "num_experts": 2},
        },
    }
    for name, values in sections_of.items():
        until = "bench" if name == "weave" else "eval"
        run_stages(run_config(tiny_llama, **values), folder / name, until=until)
    return [folder / name for name in sections_of]


@pytest.fixture(scope="module")
def runs(run_dirs: list[Path]) -> list[RunFacts]:
    return read_runs(run_dirs)


@pytest.fixture(scope="module")
def html(runs: list[RunFacts]) -> str:
    return report_page(runs)


class Page(HTMLParser):
    """Links and figures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.figures: list[dict[str, str]] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self._inside.append(tag)
        self.links += [value for name in ("src", "href") if (value := values.get(name))]
        if identity := values.get("id"):
            self.ids.append(identity)
        if tag == "figure":
            self.figures.append({})
        if tag == "svg":
            self.figures[-1] |= {"label": values["aria-label"] or "", "role": values["role"] or ""}

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        for tag in ("h3", "figcaption", "text"):
            if self.figures and "figure" in self._inside and tag in self._inside:
                self.figures[-1][tag] = self.figures[-1].get(tag, "") + data


def test_every_picture_is_whole_and_nothing_is_fetched(runs: list[RunFacts], html: str) -> None:
    page = Page()
    page.feed(html)

    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]{2})", html)) <= {"#p"}
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    anchors = {link[1:] for link in page.links if re.match(r"#[a-z]+$", link)}
    assert anchors <= set(page.ids)

    drawn = [picture for section in sections(runs) for picture in section.pictures]
    assert len(page.figures) == len(drawn) > 15
    for figure, picture in zip(page.figures, drawn, strict=True):
        assert figure["h3"] == figure["label"] == picture.title
        assert figure["role"] == "img"
        assert figure["figcaption"].strip().endswith(".")
        assert picture.axes.x in figure["text"]
        assert picture.axes.y in figure["text"]
    # Nothing is left of the marks that stand for colours.
    assert not re.search(r"#(f0000\d|0a0b0c|1a1b1c)", html)


def test_the_page_says_what_the_stages_measured(runs: list[RunFacts], html: str) -> None:
    filled = {section.key for section in sections(runs) if section.pictures}
    assert filled >= {"quality", "layers", "balance", "domains", "neurons", "stability"}
    assert filled >= {"affinity", "training", "time"}
    weave = runs[0]
    assert weave.missing == ()
    texts = getattr(weave.assembled.smoke_test, "texts", ())
    assert len(texts) == 4
    assert all(text.prompt in unescape(html) for text in texts)
    assert weave.predicted_kl is not None
    assert sum(weave.predicted_kl) == pytest.approx(weave.split.predicted_kl)
    for run in runs:
        for stage, manifest in run.manifests.items():
            assert manifest.digest[:16] in html
            assert f"Settings of {stage}, {run.name}" in html


def test_activation_rates_by_hand(run_dirs: list[Path]) -> None:
    calibration = open_calibration(run_dirs[0] / "calibrate")
    facts = neuron_facts(calibration)
    profiles = [
        read_record(path, LayerProfile) for path in sorted(calibration.folder.glob("layer_*"))
    ]
    rates_LF = torch.stack(
        [
            torch.stack([(p.marker_neurons_TA == j).any(1).float().mean() for j in range(64)])
            for p in profiles
        ]
    )
    expected = rates_LF.std(1, correction=0) / rates_LF.mean(1)
    assert facts.rate_variation == pytest.approx(expected.tolist(), rel=1e-4)
    above = [float((rates_LF >= edge).float().mean()) for edge in RATE_EDGES[:-1]]
    assert [sum(facts.histogram[1][i:]) for i in range(len(above))] == pytest.approx(above)


def test_usage_by_domain_adds_up(runs: list[RunFacts]) -> None:
    usage = runs[0].domains
    assert usage is not None
    counts = torch.tensor(usage.shares)
    assert counts.shape == (len(usage.groups), len(usage.overall))
    # Whatever the weights of the groups are, the mean lies between them.
    overall = torch.tensor(usage.overall)
    assert (counts.min(0).values <= overall + 1e-6).all()
    assert (counts.max(0).values >= overall - 1e-6).all()
    assert max(usage.information) > 0
    assert runs[1].domains is None


def test_the_line_joins_what_nothing_beats(runs: list[RunFacts]) -> None:
    first = runs[0]

    def made(name: str, flops: float, nll: float) -> RunFacts:
        increase = first.compared.nll_increase.model_copy(update={"mean": nll})
        values = {"ffn_flops": flops, "nll_increase": increase, "speedups": {}}
        return replace(first, name=name, compared=first.compared.model_copy(update=values))

    four = [made("a", 0.5, 0.3), made("b", 0.7, 0.1), made("c", 0.7, 0.2), made("d", 0.8, 0.4)]
    picture = quality_pictures(four)[0]
    assert {row[0]: float(row[2]) for row in picture.rows}["b"] == pytest.approx(
        math.exp(0.1), rel=1e-3
    )
    (path,) = re.findall(
        r'<path d="([^"]+)"[^>]*stroke: var\(--rule\); stroke-width: 2', picture.svg
    )
    assert path.count("M") + path.count("L") == 2


def test_a_run_keeps_its_colour_where_another_has_no_value() -> None:
    axes = Axes("x", "y")
    both = {"one": Curve([(0, 1), (1, 2)]), "two": Curve([(0, 2), (1, 3)])}
    without = {"one": Curve([]), "two": both["two"]}
    for series in (both, without):
        assert "var(--s1)" in curves("t", axes, "r.", series).svg
    assert "var(--s0)" not in curves("t", axes, "r.", without).svg


def test_the_command_writes_the_file(run_dirs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(run_dirs[0]), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_text().startswith("<!doctype html>")
    missing = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(out)])
    assert missing.exit_code == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(html: str, tmp_path: Path) -> None:
    """At two widths, in the light and in the dark: nothing sticks out, nothing is asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = tmp_path / "page.html"
    path.write_text(html)
    shots = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        for width, scheme in ((1280, "light"), (390, "dark")):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
            )
            requests: list[str] = []
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto(path.as_uri())
            assert requests == [path.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") == width
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.className") == "skip"
            page.locator("figure").nth(2).scroll_into_view_if_needed()
            shots.append(page.screenshot())
        browser.close()
    light, dark = (imread(io.BytesIO(shot), format="png")[..., :3] for shot in shots)
    assert light.shape[1] == 1280
    assert dark.shape[1] == 390
    assert light.mean() > 0.7
    assert dark.mean() < 0.3
    assert min(light.std(), dark.std()) > 0.05


def test_a_layer_among_the_others(run_dirs: list[Path], runs: list[RunFacts]) -> None:
    def inspect(*words: str | int | Path) -> Result:
        return CliRunner().invoke(app, ["inspect", *map(str, words)])

    plain = inspect(run_dirs[0], "--layer", 2)
    assert plain.exit_code == 0, plain.output
    weave = runs[0]
    captured = [row.captured_contribution for row in weave.routers.layers]
    row = next(line for line in plain.output.splitlines() if "captured" in line)
    assert format_percent(captured[2]) in row
    assert f"{sorted(captured, reverse=True).index(captured[2]) + 1} of 4" in row
    assert "│" in row.split("of 4")[1]
    for name in ("predicted KL", "experts per token", "activation rate", "oracle"):
        assert name in plain.output
    found = json.loads(inspect(run_dirs[0], "--layer", 2, "--json").stdout)
    usage = found["spreads"]["token share of each expert, eval"]
    assert usage == pytest.approx(weave.quality.expert_usage[2].token_share)
    assert sum(next(v for k, v in found["spreads"].items() if "rate" in k)) == 64
    assert "static" in inspect(run_dirs[1], "--layer", 0).output
    assert "layers 0 to 3" in inspect(run_dirs[0], "--layer", 4).stderr


def test_sparklines_by_hand() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([5, 6, 12]) == "▁▂█"
    assert sparkline([6, 7], low=0.0) == "▇█"
    assert sparkline([0, 0]) == "▁▁"
