"""Number formats by hand, and the two renderings of a table."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from weaver.report.tables import (
    console_table,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
    markdown_table,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (1_234_567, "1.23M"),
        (134_515_008, "135M"),
        (999_600, "1M"),
        (999_400, "999K"),
        (7.0e9, "7G"),
        (-2500, "-2.5K"),
        (12.5, "12.5"),
    ],
)
def test_format_count(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5 GiB"), (2**20 - 1, "1 MiB")],
)
def test_format_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00085, "850 us"),
        (0.0009996, "1 ms"),
        (0.0125, "12.5 ms"),
        (0.9996, "1.0 s"),
        (3.24, "3.2 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (-3.0, "-3.0 s"),
    ],
)
def test_format_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.8651, "0.87x"), (1.333, "1.33x"), (9.996, "10.0x"), (12.54, "12.5x")]
)
def test_format_ratio(value: float, text: str) -> None:
    assert format_ratio(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (20.1284, "20.13"),
        (0.43118, "0.4312"),
        (1234.4, "1234"),
        (0, "0"),
        (0.000012, "1.2e-05"),
        (2.5e7, "2.5e+07"),
        (-5.5, "-5.500"),
    ],
)
def test_format_number(value: float, text: str) -> None:
    assert format_number(value) == text


def test_format_percent() -> None:
    assert format_percent(0.125) == "12.5%"


@given(st.floats(0, 1e15))
def test_counts_stay_close_to_the_value(value: float) -> None:
    text = format_count(value)
    units = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    number = float(text.rstrip("KMGTP")) * units.get(text[-1], 1.0)
    assert number == pytest.approx(value, rel=6e-3, abs=6e-3)


def test_markdown_table_by_hand() -> None:
    table = markdown_table(("method", "perplexity"), [("flap", "44.6"), ("cmoe", "52.51")])
    assert table == (
        "| method | perplexity |\n"
        "| ------ | ---------: |\n"
        "| flap   |       44.6 |\n"
        "| cmoe   |      52.51 |\n"
    )


def test_markdown_escapes_what_would_break_the_table() -> None:
    assert "| a\\|b<br>c |" in markdown_table(("x",), [("a|b\nc",)])


def test_missing_values_do_not_change_the_alignment() -> None:
    rows = [("1.33x",), ("-",), ("",)]
    assert markdown_table(("speed",), rows).splitlines()[1] == "| ----: |"
    assert markdown_table(("speed",), [("-",)]).splitlines()[1] == "| ----- |"


def test_table_without_rows() -> None:
    assert markdown_table(("a", "b"), []) == "| a   | b   |\n| --- | --- |\n"


def test_console_table_shows_the_same_cells_without_markup() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(console_table("Speed [cpu]", ("name", "ms"), [("[bold]x", 12), ("y", "-")]))
    text = stream.getvalue()
    assert "Speed [cpu]" in text
    assert "[bold]x" in text
    assert "12" in text
    assert "ms" in text


def test_rows_must_fit_the_headers() -> None:
    with pytest.raises(ValueError, match="a row has 1 cells for 2 headers"):
        markdown_table(("a", "b"), [(1,)])
    with pytest.raises(ValueError, match="a row has 3 cells for 2 headers"):
        console_table("t", ("a", "b"), [(1, 2, 3)])
