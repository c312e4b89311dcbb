"""Shared frame of the subcommands that run stages: context, dry run, and what is printed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weaver.cli.show import show_manifest
from weaver.report.terminal import make_console

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.rundir.stage_run import StageContext

# Columns where nobody looks at a terminal: no cell of a table is cut off in a file or a pipe.
PIPE_COLUMNS = 240


def _columns() -> int | None:
    """Width of the output; None for that of the terminal, or what COLUMNS says."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS


console = make_console(highlight=False, soft_wrap=True, width=_columns())


@dataclass(frozen=True)
class Output:
    """Output of a command that runs stages: tables, JSON, or errors alone.

    Args:
        quiet: no progress, no notes and no tables; warnings on standard error.
        as_json: one JSON value instead of tables; notes and warnings go to standard error.
        rows: stages that were shown, as values of JSON.
    """

    quiet: bool = False
    as_json: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Print a line about a stage at work."""
        if not self.quiet:
            where = make_console(stderr=True, soft_wrap=True) if self.as_json else console
            where.print(line, markup=False, highlight=False)

    def stage(self, name: str, manifest: StageManifest, folder: Path) -> None:
        """Show what a stage made."""
        from weaver.rundir.inspection import stage_row

        self.rows.append(stage_row(name, folder, manifest))
        if self.shows_tables:
            show_manifest(console, name, manifest, folder)
            return
        from weaver.cli.show_summaries import show_warnings

        show_warnings(make_console(stderr=True, soft_wrap=True), name, manifest.summary)

    def finish(self, *, single: bool) -> None:
        """Print the JSON: of the one stage, or of all in a list."""
        if self.as_json:
            print(json.dumps(self.rows[0] if single else self.rows, indent=2))

    @property
    def shows_tables(self) -> bool:
        """Whether there is more to print than JSON or nothing."""
        return not (self.quiet or self.as_json)


def make_context(
    run_dir: Path,
    output: Output | None = None,
    *,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
    data_dir: Path | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> StageContext:
    """The context of a command on this console, which prints everything unless told otherwise."""
    output = output or Output()
    from weaver.models.device import resolve_device
    from weaver.report.progress import stage_progress
    from weaver.rundir.stage_run import StageContext, no_progress

    quiet_libraries()
    return StageContext(
        run_dir=run_dir,
        seed=seed,
        force=force,
        dry_run=dry_run,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
        device=resolve_device(device),
        progress=no_progress if output.quiet else stage_progress(),
        say=output.note,
    )


def run_stage(
    context: StageContext,
    output: Output,
    stage: str,
    call: Callable[[StageContext], StageManifest],
    folder: Path | None = None,
) -> None:
    """Run one stage and show what it made.

    Args:
        context: the run directory.
        output: how to show it.
        stage: its name.
        call: runs it.
        folder: the stage's folder, where it is not the one in the run directory.
    """
    from weaver.rundir.stage_run import WouldRun, no_progress
    from weaver.stages.pipeline import run_pipeline

    if context.dry_run:
        try:
            call(context)
        except WouldRun as would:
            _show_plan(output, stage, would.status)
        else:
            _show_plan(output, stage, "skip")
        return
    if is_follower(stage):
        call(replace(context, progress=no_progress, say=lambda _line: None))
        return
    run_pipeline(
        context,
        {stage: call},
        lambda name, manifest: output.stage(name, manifest, folder or context.folder(name)),
    )
    output.finish(single=True)


def _show_plan(output: Output, stage: str, would: str) -> None:
    if output.as_json:
        print(json.dumps({"stage": stage, "would": would}))
    elif would == "skip":
        console.print(f"{stage}: complete, would be skipped")
    else:
        console.print(f"{stage}: would {would}")


def is_follower(stage: str) -> bool:
    """Whether this process trains beside a main one, which holds the lock and speaks.

    Only ``finetune`` is distributed; every other command is one process, whatever a launcher says.
    """
    rank, count = (os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE"))
    started = rank.isdecimal() and count.isdecimal() and int(count) > 1
    return stage == "finetune" and started and int(rank) > 0


def quiet_libraries() -> None:
    """Leave progress and notices to weaver."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
