"""``weaver report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.session import console
from weaver.errors import require_extra


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the baseline.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The HTML file to write.", show_default=True)
    ] = Path("report.html"),
) -> None:
    """Write one HTML page with numbers and pictures of evaluated runs, which works offline."""
    require_extra("matplotlib", "report", "report")
    from weaver.artifacts.store import write_text
    from weaver.report.page import report_page
    from weaver.stages.report import read_runs

    write_text(out, report_page(read_runs(runs)))
    console.print(f"report: {out}", markup=False)
