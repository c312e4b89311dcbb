"""``weaver sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.options import DataDir, Overrides
from weaver.cli.session import console, quiet_libraries
from weaver.config.sweeping import load_sweep
from weaver.errors import WeaverError, require_extra


def sweep(
    config: Annotated[Path, typer.Argument(help="Run file with a section sweep.")],
    out: Annotated[Path, typer.Argument(help="Folder for a run directory per cell.")],
    overrides: Overrides = None,
    data_dir: DataDir = None,
) -> None:
    """Convert and measure every combination of methods, sparsities, slices and seeds."""
    file = load_sweep(config, overrides or [])
    require_extra("matplotlib", "report", "sweep")
    quiet_libraries()
    from weaver.stages.sweep import COMPARISON, LOGS, REPORT, run_sweep

    failures = run_sweep(
        file, out, data_dir=data_dir, say=lambda line: console.print(line, markup=False)
    )
    for name in (COMPARISON, REPORT):
        if (out / name).exists():
            console.print(f"{out / name}", markup=False)
    if failures:
        raise WeaverError(
            f"{len(failures)} cells failed: {', '.join(each.cell for each in failures)}",
            why=failures[0].error,
            fix=f"see {out / LOGS}; the same command tries them again and skips what is finished",
        )
