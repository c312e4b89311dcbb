"""results.json of ``bench``: what it holds, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from weaver.artifacts.bench_results import BenchHeader, BenchResult, BenchRow


def bench_row(**changes: Any) -> BenchRow:
    values: dict[str, Any] = {
        "tokens": 128,
        "phase": "prefill",
        "dense_ms": 10.0,
        "dense_p10_ms": 9.0,
        "dense_p90_ms": 12.0,
        "moe_ms": 8.0,
        "moe_p10_ms": 8.0,
        "moe_p90_ms": 9.0,
        "speedup": 1.25,
        "bound": 1.33,
        "bound_share": 0.94,
        "dense_tokens_per_second": 12800.0,
        "moe_tokens_per_second": 16000.0,
    }
    return BenchRow(**(values | changes))


def test_bench_rows_are_a_flat_list_and_back() -> None:
    header = BenchHeader(device="cpu", threads=2, dtype="bfloat16", versions={"torch": "2.13"})
    result = BenchResult(header=header, rows=(bench_row(), bench_row(tokens=1, phase="decode")))
    rows = json.loads(json.dumps(result.flat_rows()))
    assert [row["tokens"] for row in rows] == [128, 1]
    assert rows[0]["speedup"] == 1.25
    assert rows[1]["device"] == "cpu"
    assert BenchResult.from_flat_rows(rows) == result


def test_bench_rows_of_two_machines_do_not_mix() -> None:
    header = BenchHeader(device="cpu", threads=2, dtype="bfloat16")
    rows = BenchResult(header=header, rows=(bench_row(), bench_row())).flat_rows()
    rows[1]["device"] = "cuda"
    with pytest.raises(ValueError, match="one common header"):
        BenchResult.from_flat_rows(rows)
    with pytest.raises(ValueError, match="one common header"):
        BenchResult.from_flat_rows([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_p10_ms": 8.5}, "moe times are not ordered: 8.5, 8.0, 9.0"),
        ({"dense_p90_ms": 9.5}, "dense times are not ordered"),
        ({"moe_ms": 0.0, "moe_p10_ms": 0.0}, "greater than 0"),
    ],
)
def test_impossible_times_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        bench_row(**change)


# What is only known of single FFNs.
OF_LAYERS: dict[str, Any] = {
    "layer": 0,
    "dense_variant": "rows",
    "path": "native grouped",
    "grouped_mm_ms": 9.5,
    "routing_ms": 0.25,
    "relative_error": 1e-7,
}


def test_bench_rows_of_single_ffns_are_a_flat_list_and_back() -> None:
    header = BenchHeader(
        device="cpu",
        threads=2,
        dtype="bfloat16",
        level="kernel",
        routing="skewed",
        peak_memory_bytes=12345,
        clock_mhz=2400.5,
    )
    result = BenchResult(header=header, rows=(bench_row(**OF_LAYERS), bench_row(layer=3)))
    rows = json.loads(json.dumps(result.flat_rows()))
    assert {name: rows[0][name] for name in OF_LAYERS} == OF_LAYERS
    assert [row["layer"] for row in rows] == [0, 3]
    assert [rows[1][name] for name in OF_LAYERS if name != "layer"] == [None] * 5
    for row in rows:
        assert (row["level"], row["routing"]) == ("kernel", "skewed")
        assert (row["peak_memory_bytes"], row["clock_mhz"]) == (12345, 2400.5)
    assert BenchResult.from_flat_rows(rows) == result
    rows[1]["level"] = "layer"
    with pytest.raises(ValueError, match="one common header"):
        BenchResult.from_flat_rows(rows)


def test_rows_from_before_single_ffns_were_timed_are_of_whole_models() -> None:
    header = BenchHeader(device="cpu", threads=2, dtype="bfloat16")
    result = BenchResult(header=header, rows=(bench_row(),))
    added = {*OF_LAYERS, "level", "routing", "clock_mhz", "peak_memory_bytes"}
    (row,) = result.flat_rows()
    old = BenchResult.from_flat_rows([{k: v for k, v in row.items() if k not in added}])
    assert old == result
    assert (old.header.level, old.header.routing) == ("model", "real")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grouped_mm_ms": 0.0}, "greater than 0"),
        ({"routing_ms": -1.0}, "greater than 0"),
        ({"relative_error": float("inf")}, "finite number"),
    ],
)
def test_impossible_values_of_single_ffns_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        bench_row(**(OF_LAYERS | change))


def test_what_was_timed_is_named() -> None:
    with pytest.raises(ValidationError, match="Input should be 'layer' or 'kernel'"):
        BenchHeader.model_validate({"device": "cpu", "threads": 2, "dtype": "", "level": "experts"})
