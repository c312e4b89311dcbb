"""``weaver assemble``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import ConfigFile, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config.loading import load_section, load_seed
from weaver.config.sections import AssembleConfig


def assemble(
    run_dir: RunDir,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as the dense model), float32, bfloat16, float16.")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Such as 5GB or 500MB.")] = None,
    smoke_test: Annotated[
        bool | None,
        typer.Option(
            "--smoke-test/--no-smoke-test",
            help="Compare it with the dense model on a few hundred tokens; default: yes.",
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Write the converted model as a Hugging Face model folder."""
    flags = {"dtype": dtype, "max_shard_size": max_shard_size, "smoke_test": smoke_test}
    settings = load_section(AssembleConfig, "assemble", config, overrides or [], flags)
    from weaver.stages.assemble import assemble as stage

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=None,
    )
    run_stage(context, "assemble", lambda c: stage(c, settings))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("assemble", rich_help_panel="Stages")(assemble)
