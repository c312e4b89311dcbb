"""Shared frame of the subcommands that run a stage: context, lock, dry run, printed result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from weaver.cli.show import show_manifest

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.rundir.stage_run import StageContext

# Columns where nobody looks at a terminal: no cell of a table is cut off in a file or a pipe.
PIPE_COLUMNS = 240


def _columns() -> int | None:
    """Width of the output; None for that of the terminal, or what COLUMNS says."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS


console = Console(highlight=False, soft_wrap=True, width=_columns())


def make_context(
    run_dir: Path, *, seed: int, force: bool, dry_run: bool, data_dir: Path | None
) -> StageContext:
    """The context of a command on this console."""
    from weaver.report.progress import stage_progress
    from weaver.rundir.stage_run import StageContext

    quiet_libraries()
    if is_follower():
        return StageContext(run_dir, seed, force, dry_run, data_dir)
    return StageContext(
        run_dir=run_dir,
        seed=seed,
        force=force,
        dry_run=dry_run,
        data_dir=data_dir,
        progress=stage_progress(),
        say=lambda line: console.print(line, markup=False),
    )


def run_stage(
    context: StageContext,
    stage: str,
    call: Callable[[StageContext], StageManifest],
    folder: Path | None = None,
) -> None:
    """Run one stage and show what it made.

    Args:
        context: the run directory.
        stage: its name.
        call: runs it.
        folder: the stage's folder, where it is not the one in the run directory.
    """
    from weaver.rundir.stage_run import WouldRun
    from weaver.stages.pipeline import run_pipeline

    if context.dry_run:
        try:
            call(context)
        except WouldRun as would:
            console.print(f"{stage}: would {would.status}")
        else:
            console.print(f"{stage}: complete, would be skipped")
        return
    if is_follower():
        call(context)
        return

    def show(name: str, manifest: StageManifest) -> None:
        show_manifest(console, name, manifest, folder or context.folder(name))

    run_pipeline(context, {stage: call}, show)


def is_follower() -> bool:
    """Whether this process trains beside a main one, which holds the lock and speaks."""
    return int(os.environ.get("RANK", "0")) > 0


def quiet_libraries() -> None:
    """Leave progress and notices to weaver."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
