"""``weaver bench`` and ``bench-layer`` as commands: tables, files, and what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from tiny_runs import file_times, run_config, run_stages
from typer.testing import CliRunner, Result

import weaver.cli.app
from weaver.artifacts.bench_results import BenchHeader, BenchResult, BenchRow
from weaver.cli.show_speeds import show_bench
from weaver.evaluation import layers

SIZE = ("--hidden-size", "32", "--intermediate-size", "64")
SHORT = ("--tokens", "1,8", "--repeats", "1", "--set", "bench.warmup=0")


@pytest.fixture(autouse=True)
def _a_single_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny layer thousands would be made."""
    monkeypatch.setattr(layers, "STACK_BYTES", 1)


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(weaver.cli.app.app, [*map(str, words)])


def bench(*words: str | Path) -> Result:
    return invoke("bench-layer", *words)


def refusal(*words: str | Path) -> tuple[str, str, str]:
    """Run a command that is refused and return the what, why and fix of its error."""
    result = bench(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    match = re.fullmatch(r"error: (.+)\n  why: (.+)\n  fix: (.+)\n", result.stderr)
    assert match, result.stderr
    what, why, fix = match.groups()
    return what, why, fix


def table(output: str) -> list[dict[str, str]]:
    """The cells of every row, by header."""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in output.splitlines()]
    headers, *rows = (cells[1:-1] for cells in lines if len(cells) > 3)
    return [dict(zip(headers, row, strict=True)) for row in rows]


def column(output: str, *headers: str) -> list[list[str]]:
    return [[row[header] for header in headers] for row in table(output)]


@pytest.mark.parametrize("level", ["layer", "kernel"])
def test_a_size(tmp_path: Path, level: str) -> None:
    json_file, plot = tmp_path / "rows.json", tmp_path / "speedup.svg"
    flags = ("--level", level, "--num-experts", "8", "--sparsity", "0.5", "--seed", "1")

    result = bench(*SIZE, *SHORT, *flags, "--json", json_file, "--plot", plot)

    assert result.exit_code == 0, result.output
    rows = json.loads(json_file.read_text())
    assert [row["tokens"] for row in rows] == [1, 8]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["bound"] * row["bound_share"])
        assert (row["level"], row["routing"], row["dtype"]) == (level, "uniform", "float32")
        assert row["layer"] is None
    # 4 of 8 slices of 8 are active: 3 * 64 rows against 3 * 32 and 7 of the router.
    assert rows[1]["bound"] == pytest.approx(192 / 103)
    assert len(BenchResult.from_flat_rows(rows).rows) == 2
    svg = ElementTree.parse(plot).getroot()
    titles = [each.text for each in svg.iter() if each.tag.endswith("title")]
    assert sorted(titles, key=str) == sorted(f"{row['speedup']:.2f}x" for row in rows)
    assert f"level {level}, uniform routing" in result.output
    speedups = [["1", rows[0]["speedup"]], ["8", rows[1]["speedup"]]]
    assert column(result.output, "tokens", "speed-up") == [
        [tokens, f"{ratio:.2f}x" + (" slower than dense" if ratio < 1 else "")]
        for tokens, ratio in speedups
    ]


def test_defaults_of_a_size(tmp_path: Path) -> None:
    json_file = tmp_path / "rows.json"
    flags = ("--routing", "skewed", "--dtype", "bfloat16", "--threads", "1")

    assert bench(*SIZE, *SHORT, *flags, "--json", json_file).exit_code == 0

    (_, row) = json.loads(json_file.read_text())
    assert (row["routing"], row["dtype"], row["threads"]) == ("skewed", "bfloat16", 1)
    # 6 of 8 slices: 3 * 48 rows and 6 of the router.
    assert row["bound"] == pytest.approx(192 / 150)
    assert list(tmp_path.iterdir()) == [json_file]


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("bench") / "run"
    run_stages(run_config(tiny_llama), run_dir, until="assemble")
    return run_dir


def test_layers_of_a_run(converted: Path, tmp_path: Path) -> None:
    json_file, before = tmp_path / "rows.json", file_times(converted)
    words = ("--run-dir", converted, "--layer", "1", "--layer", "3", *SHORT)

    result = bench(*words, "--json", json_file)

    assert result.exit_code == 0, result.output
    rows = json.loads(json_file.read_text())
    assert [(row["layer"], row["tokens"]) for row in rows] == [(1, 1), (1, 8), (3, 1), (3, 8)]
    assert {row["routing"] for row in rows} == {"real"}
    cells = column(result.output, "layer", "tokens")
    assert cells == [["1", "1"], ["1", "8"], ["3", "1"], ["3", "8"]]
    assert file_times(converted) == before
    assert "layer 9 has no routed experts" in refusal(*words, "--layer", "9")[0]


def test_whole_models(converted: Path) -> None:
    result = invoke("bench", "--run-dir", converted, *SHORT, "--decode-tokens", "0")

    assert result.exit_code == 0, result.output
    assert "level model, real routing" in result.output
    rows = json.loads((converted / "bench" / "results.json").read_text())
    assert [(row["tokens"], row["level"], row["path"]) for row in rows] == [
        (1, "model", None),
        (8, "model", None),
    ]
    assert (converted / "bench" / "speedup.svg").read_text().count("<circle") == 2
    assert column(result.output, "phase", "tokens") == [["prefill", "1"], ["prefill", "8"]]


@pytest.mark.parametrize(
    "words", [(), ("--hidden-size", "32"), ("--intermediate-size", "64"), ("--layer", "1")]
)
def test_nothing_to_time(words: tuple[str, ...]) -> None:
    what, why, fix = refusal(*words)
    assert what == "nothing to time"
    assert why.startswith("bench-layer times FFNs of a run, or one whose hidden and")
    assert fix.startswith("weaver bench-layer --run-dir RUN, or weaver bench-layer --hidden-size")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--routing", "real"), "there is no real routing for an FFN that is only a size"),
        (("--sparsity", "0.05"), "sparsity 0.05 leaves 8 of 8 experts active"),
        (("--num-experts", "7"), "64 neurons do not divide into 7 slices"),
        (("--tokens", "0"), "tokens.0: Input should be greater than 0"),
        (("--tokens", "1,x"), "tokens.1: Input should be a valid integer"),
    ],
)
def test_bad_flags_of_a_size(flags: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    json_file = tmp_path / "rows.json"
    assert expected in refusal(*SIZE, "--json", json_file, *flags)[0]
    assert not json_file.exists()


def test_a_flag_that_would_do_nothing() -> None:
    said, why, fix = refusal("--run-dir", "run", "--sparsity", "0.5", "--num-experts", "8")
    assert said == "--num-experts, --sparsity would do nothing for the FFNs of a run"
    assert why == "the run says how large its FFNs are and how they are split"
    assert fix == "leave --num-experts and --sparsity out, or --run-dir"
    assert refusal(*SIZE, "--layer", "0")[0] == "--layer would do nothing for the size of an FFN"


def test_bench_with_a_level_is_bench_layer(tmp_path: Path) -> None:
    json_file = tmp_path / "rows.json"
    words = ("--level", "layer", *SIZE, *SHORT, "--json", json_file)
    assert invoke("bench", *words).exit_code == 0
    assert [row["tokens"] for row in json.loads(json_file.read_text())] == [1, 8]


ROW = BenchRow(
    tokens=8,
    phase="prefill",
    **{f"dense_{q}ms": ms for q, ms in (("p10_", 1.5), ("", 2.0), ("p90_", 2.5))},
    **{f"moe_{q}ms": ms for q, ms in (("p10_", 1.0), ("", 1.6), ("p90_", 3.0))},
    speedup=1.25,
    bound=1.5,
    bound_share=0.8333,
    dense_tokens_per_second=4000,
    moe_tokens_per_second=5000,
).model_dump()
OF_LAYERS = {
    "layer": 0,
    "dense_variant": "rows",
    "path": "native grouped",
    "grouped_mm_ms": 4.126,
    "routing_ms": 0.0123,
    "relative_error": 1.234e-3,
}


def shown(*rows: dict[str, Any], width: int = 250, **header: Any) -> str:
    values = {"device": "a processor", "threads": 2, "dtype": "float32", **header}
    record = BenchHeader(versions={"torch": "2.13"}, **values)
    file = io.StringIO()
    result = BenchResult(header=record, rows=tuple(BenchRow(**row) for row in rows))
    show_bench(Console(file=file, width=width), result)
    return file.getvalue()


ALWAYS = {
    "tokens": "8",
    "dense ms": "2.00 (1.50-2.50)",
    "converted ms": "1.60 (1.00-3.00)",
    "speed-up": "1.25x",
    "bound": "1.50x",
    "of bound": "83.3%",
}
SINGLE = {
    "layer": "0",
    "path": "native grouped",
    "dense by": "rows",
    "grouped_mm ms": "4.13",
    "routing ms": "0.012",
    "relative error": "1.2e-03",
}


def test_columns_without_values_are_left_out() -> None:
    of_models = {"phase": "prefill", "dense tokens/s": "4000.0", "converted tokens/s": "5000.0"}
    assert table(shown(ROW)) == [ALWAYS | of_models]
    assert table(shown(ROW | OF_LAYERS)) == [ALWAYS | SINGLE]
    # A threshold in a layer of a given size.
    less = {"grouped_mm_ms": None, "layer": None}
    kept = {name: cell for name, cell in SINGLE.items() if name not in {"grouped_mm ms", "layer"}}
    assert table(shown(ROW | OF_LAYERS | less)) == [ALWAYS | kept]


def test_a_value_that_is_missing_in_one_row_only() -> None:
    cells = column(shown(ROW | OF_LAYERS | {"grouped_mm_ms": None}, ROW | OF_LAYERS), *SINGLE)
    assert cells == [list((SINGLE | {"grouped_mm ms": "-"}).values()), list(SINGLE.values())]


def test_a_narrow_terminal_shows_what_matters_most() -> None:
    (row,) = table(shown(ROW | OF_LAYERS, width=100))
    assert row == {
        "layer": "0",
        "tokens": "8",
        "dense ms": "2.00",
        "converted ms": "1.60",
        "speed-up": "1.25x",
        "bound": "1.50x",
        "grouped_mm ms": "4.13",
        "relative error": "1.2e-03",
    }


def test_the_title_says_what_was_timed_and_where() -> None:
    text = shown(ROW, level="kernel", routing="skewed")
    where = "a processor, 2 thread(s), float32, torch 2.13; level kernel, skewed routing; medians"
    assert where in text
    assert "peak memory" not in text
    text = shown(ROW, peak_memory_bytes=2**31, clock_mhz=2400.4)
    assert "; peak memory 2 GiB" in text
    assert "a processor, 2400 MHz, 2 thread(s)" in text


def test_slower_is_said_plainly() -> None:
    slow = ROW | {"speedup": 0.8, "tokens": 1}
    text = shown(slow, ROW, ROW | {"speedup": 1.0})
    assert column(text, "speed-up") == [["0.80x slower than dense"], ["1.25x"], ["1.00x"]]
