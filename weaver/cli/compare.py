"""``weaver compare``."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.session import console
from weaver.errors import WeaverError


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the baseline.")],
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")] = False,
) -> None:
    """Put evaluated runs side by side: quality with paired intervals, cost, size and speed."""
    if as_markdown + as_json + as_csv > 1:
        raise WeaverError(
            "more than one of --markdown, --json and --csv",
            why="the runs are printed once",
            fix="leave the others out",
        )
    from weaver.report.runs_table import NOTE, runs_table
    from weaver.report.tables import console_table, markdown_table
    from weaver.report.terminal import printable
    from weaver.stages.compare import compare_runs

    found = compare_runs(runs)
    heads, cells = runs_table(found)
    # Tables for other programs go around the console, which would write control characters out.
    headers, *rows = [tuple(map(printable, row)) for row in (heads, *cells)]
    if as_json:
        print(json.dumps([run.model_dump(mode="json") for run in found], indent=2))
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([headers, *rows])
    elif as_markdown:
        print(markdown_table(headers, rows), NOTE, sep="\n")
    else:
        console.print(console_table("runs", headers, rows))
        console.print(NOTE, markup=False)
