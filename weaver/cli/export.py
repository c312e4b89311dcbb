"""``weaver export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.session import run_stage
from weaver.cli.stage_command import SharedOptions, section_command
from weaver.config.sections import ExportConfig

FLAGS = ("target", "approximate", "quantisation", "remote_code", "dtype", "max_shard_size")
SPELLED = {
    "target": "--to",
    "approximate": "--approximate",
    "remote_code": "--remote-code",
}
SHARED = ("force", "dry_run", "trust_remote_code", "quiet", "as_json")


@section_command("export", ExportConfig, FLAGS, spelled=SPELLED, shared=SHARED)
def export(
    settings: ExportConfig,
    options: SharedOptions,
    *,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to make. \\[default: RUN/export-TARGET]")
    ] = None,
) -> None:
    """Write the converted model for runtimes that know nothing of weaver."""
    from weaver.stages.export import export as stage
    from weaver.stages.export import plan_export

    context = options.context(run_dir)
    plan = plan_export(context, settings, out)
    run_stage(context, options.output, "export", lambda c: stage(c, plan), plan.folder)
