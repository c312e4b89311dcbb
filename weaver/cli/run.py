"""``weaver run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.options import Calibration, DataDir, Force, Overrides, RunDir
from weaver.cli.session import console, make_context
from weaver.cli.show import show_manifest, show_plan, show_results
from weaver.config.loading import RunConfig, load_run_config

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.stages.pipeline import PlannedStage


def run(
    config: Annotated[Path, typer.Argument(help="YAML file with one section per stage.")],
    run_dir: RunDir,
    calibration: Calibration = None,
    overrides: Overrides = None,
    force: Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would run, be skipped or be refused; estimate needs."
        ),
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Run every stage of one configuration; what is finished is skipped."""
    settings = load_run_config(config, overrides or [])
    from weaver.stages.pipeline import run_pipeline, stage_calls

    context = make_context(
        run_dir, seed=settings.seed, force=force, dry_run=False, data_dir=data_dir
    )
    calls = stage_calls(settings, calibration)
    if dry_run:
        from weaver.stages.pipeline import plan_pipeline

        _show_dry_run(settings, plan_pipeline(context, calls))
        return

    def on_stage(stage: str, manifest: StageManifest) -> None:
        show_manifest(console, stage, manifest, context.folder(stage))

    run_pipeline(context, calls, on_stage)
    show_results(console, run_dir, finetuned=settings.finetune is not None)


def _show_dry_run(settings: RunConfig, plan: list[PlannedStage]) -> None:
    from weaver.models.checkpoint import Checkpoint
    from weaver.stages.estimate import estimate

    show_plan(console, plan, estimate(settings, Checkpoint(settings.model)))
    if any(stage.status == "refuse" for stage in plan):
        raise typer.Exit(1)
