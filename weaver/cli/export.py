"""``weaver export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.options import DryRun, Force
from weaver.cli.session import make_context, run_stage
from weaver.config.loading import parse_config
from weaver.config.sections import ExportConfig


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="glm4-moe, granite-moe-shared, gguf or weaver; the best that fits if left out.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to make. [default: RUN/export-TARGET]")
    ] = None,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Replace what the target cannot hold, and measure what it costs."
        ),
    ] = False,
    quantisation: Annotated[
        str | None,
        typer.Option(help="GGUF type of the weights: f32, f16, bf16 or q8_0. [default: f16]"),
    ] = None,
    remote_code: Annotated[
        bool,
        typer.Option("--remote-code", help="Add code to a weaver export that runs without weaver."),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as the model), float32, bfloat16, float16.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Such as 5GB or 500MB.")] = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Write the converted model for runtimes that know nothing of weaver."""
    flags = {
        "target": to,
        "approximate": approximate,
        "quantisation": quantisation,
        "remote_code": remote_code,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = parse_config(ExportConfig, given, source="export flags")
    from weaver.stages.export import export as stage
    from weaver.stages.export import plan_export

    context = make_context(run_dir, seed=0, force=force, dry_run=dry_run, data_dir=None)
    plan = plan_export(context, settings, out)
    run_stage(context, "export", lambda c: stage(c, plan), plan.folder)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("export", rich_help_panel="Converted models")(export)
