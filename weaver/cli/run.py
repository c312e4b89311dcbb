"""``weaver run``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.options import AsJson, Calibration, DataDir, Device, Force, Overrides, Quiet, RunDir
from weaver.cli.session import Output, console, make_context
from weaver.cli.show import show_plan, show_results
from weaver.config.loading import RunConfig, load_run_config

if TYPE_CHECKING:
    from weaver.stages.pipeline import PlannedStage


def run(
    config: Annotated[Path, typer.Argument(help="YAML file with one section per stage.")],
    run_dir: RunDir,
    calibration: Calibration = None,
    overrides: Overrides = None,
    device: Device = None,
    force: Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would run, be skipped or be refused; estimate needs."
        ),
    ] = False,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run every stage of one configuration; what is finished is skipped."""
    settings = load_run_config(config, overrides or [])
    from weaver.stages.pipeline import run_pipeline, stage_calls

    output = Output(quiet, as_json)
    context = make_context(
        run_dir,
        output,
        seed=settings.seed,
        force=force,
        dry_run=False,
        data_dir=data_dir,
        trust_remote_code=settings.model.trust_remote_code,
        device=device or settings.device,
    )
    calls = stage_calls(settings, calibration)
    if dry_run:
        from weaver.stages.pipeline import plan_pipeline

        _show_dry_run(settings, plan_pipeline(context, calls), output, run_dir)
        return
    run_pipeline(
        context,
        calls,
        lambda stage, manifest: output.stage(stage, manifest, context.folder(stage)),
    )
    output.finish(single=False)
    if output.shows_tables:
        show_results(console, run_dir, finetuned=settings.finetune is not None)


def _show_dry_run(
    settings: RunConfig, plan: list[PlannedStage], output: Output, run_dir: Path
) -> None:
    from weaver.models.checkpoint import Checkpoint
    from weaver.stages.estimate import estimate, shortages
    from weaver.stages.stage_times import expected_times

    checkpoint = Checkpoint(settings.model)
    needs, times = estimate(settings, checkpoint), expected_times(settings, checkpoint, run_dir)
    to_come = {each.stage: needs[each.stage] for each in plan if each.status != "skip"}
    lacking = shortages(to_come, run_dir)
    if output.as_json:
        values = {
            "stages": list(map(asdict, plan)),
            "needs": {stage: asdict(each) for stage, each in needs.items()},
            "times": {stage: asdict(each) for stage, each in times.items()},
        }
        print(json.dumps({**values, "shortages": lacking}, indent=2))
    else:
        show_plan(console, plan, needs, times, lacking)
    if any(stage.status == "refuse" for stage in plan):
        raise typer.Exit(1)
