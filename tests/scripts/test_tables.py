"""Every table of docs/ from one small sweep: its numbers are those that the stages wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from reproduce import TABLES
from tables import pacing, training
from tables.rows import Measured, Row, read_rows
from tiny_runs import run_values

from weaver.config.sweeping import load_sweep
from weaver.rundir.measurements import read_bench
from weaver.stages.sweep import cells_of, run_sweep

STEPS = {"steps": 8, "evaluate_every": 4, "checkpoint_every": 10}
TRAINING = {"finetune": {**STEPS, "batch_size": 1, "sequence_length": 16, "eval_windows": 2}}
DIVE = {
    "calibrate": {"groups": True},
    "partition": {"method": "dive", "num_experts": 4, "options": {"affinity_windows": 1}},
}
FISHER = {"method": "weave", "allocation": "fisher"}
METHODS: list[Any] = [
    "weave",
    {
        "name": "weave__fisher",
        "sections": {"partition": {"method": "weave", "allocation": "fisher"}},
    },
    "flap",
    {"name": "dive", "sections": DIVE},
    {"name": "flap__trained", "sections": {"partition": {"method": "flap"}, **TRAINING}},
    {"name": "dive__trained", "sections": {**DIVE, **TRAINING}},
    {"name": "random", "sections": TRAINING},
]
TEXTS = (
    "wikitext2/wiki.test.rebuilt.raw",
    "domains/code_python.jsonl",
    "multitask_calib/open.jsonl",
)


@pytest.fixture(scope="module")
def measured(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("tables")
    for name in TEXTS:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        text = " ".join(f"{name} {number}" for number in range(400))
        path.write_text(text if path.suffix == ".raw" else json.dumps({"text": text}) + "\n")
    items = [{"query": f"{n}", "choices": ["a", "bb"], "gold": n % 2} for n in range(6)]
    (folder / "easy.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    values = run_values(
        tiny_llama,
        calibrate={"tokens": 1024},
        eval={"tasks": ["easy.jsonl"], "router": True, "windows": 2},
        bench={"tokens": [4], "decode_tokens": 2},
    )
    del values["partition"]
    sweep = {"methods": METHODS, "sparsities": [0.5]}
    (folder / "all.yaml").write_text(yaml.safe_dump({**values, "sweep": sweep}))
    file = load_sweep(folder / "all.yaml")
    assert run_sweep(file, folder / "all", data_dir=folder, say=print) == []
    return Measured(read_rows(cells_of(file), folder / "all"), folder / "page.md", folder)


def chosen(measured: Measured, *names: str) -> Measured:
    rows = [row for row in measured.rows if row.name in names]
    return Measured(rows, measured.page, measured.data_dir)


def cells(table: str, label: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def row(measured: Measured, name: str) -> Row:
    (found,) = [each for each in measured.rows if each.name == name]
    return found


def test_routers(measured: Measured) -> None:
    shown = cells(TABLES["routers"](measured), "weave")
    report = row(measured, "weave").result.router
    assert report is not None
    assert shown[1] == f"{report.mean.oracle_agreement:.3f}"
    assert cells(TABLES["routers"](measured), "flap")[1] == "-"


def test_tasks(measured: Measured) -> None:
    table = TABLES["tasks"](chosen(measured, "weave", "flap"))
    flap = row(measured, "flap").result
    accuracy = flap.moe.tasks["easy.jsonl"].metrics["acc"]
    assert cells(table.split("\n\n")[0], "flap")[2] == f"{accuracy:.1%}"
    assert cells(table.split("\n\n")[0], "weave")[-1] == "-"
    lead = row(measured, "weave").result.moe.tasks["easy.jsonl"].metrics["acc"] - accuracy
    assert cells(table.split("\n\n")[1], "flap")[2].startswith(f"{lead:+.1%} (")


def test_headline(measured: Measured) -> None:
    table = TABLES["headline"](chosen(measured, "weave", "flap"))
    flap = row(measured, "flap")
    (decode,) = [each for each in read_bench(flap.run_dir).rows if each.phase == "decode"]
    shown = cells(table, "flap")
    assert shown[3] == f"{flap.result.kl:.3f}"
    assert shown[6] == f"{decode.moe_tokens_per_second:.0f} ({decode.speedup:.2f}x)"
    assert shown[8] == "transformers with weaver's code"
    assert measured.page.with_suffix(".svg").read_text().startswith("<svg")


def test_recovery_and_dive(measured: Measured) -> None:
    before, after = row(measured, "flap"), row(measured, "flap, trained")
    table = TABLES["recovery"](chosen(measured, "flap", "flap, trained"))
    shown = cells(table, "flap")
    assert shown[1:3] == ["trained", f"{8 * 16:,}"]
    assert shown[4] == f"{before.result.kl:.3f} -> {after.result.kl:.3f}"
    table = TABLES["dive"](measured)
    assert cells(table, "flap")[5:7] == [f"{each.result.kl:.3f}" for each in (before, after)]
    assert "- expert 0: " in table


def test_downcycling(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SHOWN_STEPS", (0, 4, 8))
    shown = cells(TABLES["downcycling"](chosen(measured, "random", "flap, trained")), "random")
    assert len(shown) == 5
    assert int(shown[4]) <= 8
    assert "random" in measured.page.with_suffix(".svg").read_text()


def test_prediction(measured: Measured) -> None:
    table = TABLES["conversions"](measured)
    assert cells(table, "fisher")[3] == f"{row(measured, 'weave, fisher').result.kl:.3f}"
    (line,) = [line for line in TABLES["layers"](measured).splitlines() if line.startswith("| 0 ")]
    predicted, realised = map(float, line.strip("|").split("|")[1:3])
    assert predicted > 0
    assert realised > 0
    # Measured once.
    path = row(measured, "weave").run_dir.parent / "calibration-seed0" / "prediction.json"
    made = path.stat().st_mtime_ns
    assert line in TABLES["layers"](measured)
    assert path.stat().st_mtime_ns == made


def test_pacing(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LONG": 160, "LONG_WINDOWS": 2, "SHORT_WINDOWS": 4}.items():
        monkeypatch.setattr(pacing, name, value)
    both = chosen(measured, "weave", "flap")
    assert TABLES["positions"](both).count("| WikiText-2 ") == 2
    table = TABLES["flops"](both)
    shown = [line.strip("|").split("|") for line in table.splitlines() if "| WikiText-2 " in line]
    assert len(shown) == 1
    measured_flops, asked = float(shown[0][3]), float(shown[0][2])
    assert float(shown[0][4]) == pytest.approx(measured_flops - asked, abs=2e-3)
