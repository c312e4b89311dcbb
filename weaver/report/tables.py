"""Numbers as people read them, and tables of them for the console and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

_COUNT_UNITS = ("", "K", "M", "G", "T", "P")
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_count(value: float) -> str:
    """A count with three digits and a unit of 1000: 999, 1.23M, 135M."""
    return _with_unit(value, 1000, _COUNT_UNITS, separator="")


def format_bytes(value: float) -> str:
    """Bytes with three digits and a unit of 1024: 999 B, 1.5 KiB, 12.3 MiB."""
    return _with_unit(value, 1024, _BYTE_UNITS, separator=" ")


def format_seconds(value: float) -> str:
    """A duration: 850 us, 12.5 ms, 3.2 s, 2 min 05 s, 1 h 02 min.

    The unit is the largest that leaves at least 1 after rounding.
    """
    if value < 0:
        return "-" + format_seconds(-value)
    if round(value) >= 3600:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if value >= 59.95:
        seconds = round(value)
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if value >= 0.9995:
        return f"{value:.1f} s"
    if value >= 0.9995e-3:
        return f"{_three_digits(1e3 * value)} ms"
    return f"{1e6 * value:.0f} us"


def format_ratio(value: float) -> str:
    """A factor: 0.87x, 1.33x, 12.5x."""
    return f"{value:.2f}x" if abs(value) < 9.995 else f"{value:.1f}x"


def format_percent(share: float) -> str:
    """A share of 1 in percent: 0.125 is 12.5%."""
    return f"{100 * share:.1f}%"


def format_number(value: float) -> str:
    """A measured value with four digits, 20.13, 1234, 0.4312, or with an exponent, 1.2e-05."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1:
        return f"{value:.4f}"
    if 1 <= abs(value) < 1e6:
        return f"{value:.{max(0, 3 - _magnitude(value))}f}"
    return f"{value:.3g}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose source is aligned too; columns of numbers are set to the right.

    Args:
        headers: column names.
        rows: cells, printed by ``str``; a bar or a line break in one is escaped.

    Returns:
        The table, ending with a line break.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """
    cells = [[_escape(str(cell)) for cell in row] for row in _checked(headers, rows)]
    names = [_escape(header) for header in headers]
    right = _right_aligned(headers, rows)
    widths = [
        max(3, len(name), *(len(row[column]) for row in cells)) for column, name in enumerate(names)
    ]
    rule = [
        "-" * (width - 1) + ":" if is_right else "-" * width
        for width, is_right in zip(widths, right, strict=True)
    ]
    lines = [
        [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        for row in (names, rule, *cells)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def console_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """The same table for ``rich.console.Console.print``.

    Args:
        title: stands above the table.
        headers: column names.
        rows: cells, printed by ``str`` without rich's markup.

    Raises:
        ValueError: a row has another number of cells than there are headers.
    """
    table = Table(title=Text(title), title_justify="left")
    for header, is_right in zip(headers, _right_aligned(headers, rows), strict=True):
        table.add_column(Text(header), justify="right" if is_right else "left")
    for row in _checked(headers, rows):
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _checked(
    headers: Sequence[str], rows: Sequence[Sequence[object]]
) -> Sequence[Sequence[object]]:
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row has {len(row)} cells for {len(headers)} headers: {row}")
    return rows


def _right_aligned(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    """Per column whether every cell that says something begins like a number."""
    columns = [[str(row[i]) for row in _checked(headers, rows)] for i in range(len(headers))]
    filled = [[cell for cell in column if cell not in {"", "-"}] for column in columns]
    return [
        bool(column) and all(cell.lstrip("+-")[:1].isdigit() for cell in column)
        for column in filled
    ]


def _escape(cell: str) -> str:
    return cell.replace("|", r"\|").replace("\n", "<br>")


def _with_unit(value: float, step: int, units: Sequence[str], *, separator: str) -> str:
    unit = 0
    # 999.6 would print as 1000: the unit is chosen by the number as printed.
    while unit < len(units) - 1 and round(abs(value)) >= step:
        value /= step
        unit += 1
    number = f"{value:g}" if unit == 0 and value == round(value) else _three_digits(value)
    return f"{number}{separator}{units[unit]}"


def _three_digits(value: float) -> str:
    text = f"{value:.{max(0, 2 - _magnitude(value))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _magnitude(value: float) -> int:
    """Digits before the point minus one, at least 0."""
    return max(0, len(str(int(abs(value)))) - 1)
