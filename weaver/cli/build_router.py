"""``weaver build-router``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import ConfigFile, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config.loading import load_section, load_seed
from weaver.config.sections import RouterConfig


def build_router(
    run_dir: RunDir,
    router: Annotated[
        str | None,
        typer.Option(
            help="mean-gate, representative, ridge, error-ridge or random; default: as the method."
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit", help="Re-solve the down projection; default: as the method."
        ),
    ] = None,
    constants: Annotated[
        bool | None,
        typer.Option(
            "--constants/--no-constants",
            help="Supply the mean output of skipped experts; default: as the method.",
        ),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Build a router for every layer that has routed experts, and make up for what is skipped.

    What a sequential partition was split behind is taken over, unless asked for otherwise.
    """
    flags = {"kind": router, "refit": refit, "constants": constants}
    settings = load_section(RouterConfig, "router", config, overrides or [], flags)
    from weaver.stages.build_router import build_routers

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=None,
    )
    run_stage(context, "build-router", lambda c: build_routers(c, settings))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("build-router", rich_help_panel="Stages")(build_router)
