"""``run``: every stage of one configuration, and what a run would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from weaver.artifacts.finite import NotFiniteError
from weaver.artifacts.manifest import MANIFEST, StageManifest
from weaver.config.loading import RunConfig
from weaver.errors import WeaverError
from weaver.rundir.lock import locked
from weaver.rundir.stage_folders import STAGE_FOLDERS
from weaver.rundir.stage_run import StageContext, WouldRun, settle
from weaver.stages.assemble import assemble
from weaver.stages.bench import bench
from weaver.stages.build_router import build_routers
from weaver.stages.calibrate import calibrate
from weaver.stages.evaluate import evaluate
from weaver.stages.finetune import finetune
from weaver.stages.partition import partition

StageCall = Callable[[StageContext], StageManifest]


@dataclass(frozen=True)
class PlannedStage:
    """Result of a dry run for one stage.

    Args:
        stage: its name.
        status: "run", "resume", "skip" or "refuse".
        note: why it is refused, or which stage it follows.
    """

    stage: str
    status: str
    note: str = ""


def stage_calls(config: RunConfig, calibration: Path | None = None) -> dict[str, StageCall]:
    """The stages of a configuration in their order.

    Args:
        config: the whole configuration.
        calibration: a calibrate folder of another run, which replaces this run's own.
    """
    calls: dict[str, StageCall] = {}
    if calibration is None:
        calls["calibrate"] = lambda context: calibrate(
            context, config.model, config.calibrate, conversion=config
        )
    calls["partition"] = lambda context: partition(
        context, config.partition, config.router, calibration
    )
    calls["build-router"] = lambda context: build_routers(context, config.router)
    calls["assemble"] = lambda context: assemble(context, config.assemble)
    if config.finetune is not None:
        settings = config.finetune
        calls["finetune"] = lambda context: finetune(context, settings)
    tuned = config.finetune is not None
    calls["eval"] = lambda context: evaluate(context, config.eval, finetuned=tuned)
    calls["bench"] = lambda context: bench(context, config.bench, finetuned=tuned)
    return calls


def conversion_calls(config: RunConfig, calibration: Path | None = None) -> dict[str, StageCall]:
    """The stages of a configuration that make the converted model; see ``stage_calls``."""
    calls = stage_calls(config, calibration)
    made = ("calibrate", "partition", "build-router", "assemble")
    return {stage: call for stage, call in calls.items() if stage in made}


def run_pipeline(
    context: StageContext,
    calls: dict[str, StageCall],
    on_stage: Callable[[str, StageManifest], None],
) -> None:
    """Run stages in order under the run directory's lock; finished ones are skipped.

    Args:
        context: the run directory.
        calls: the stages.
        on_stage: is called after each one, with its manifest.

    Raises:
        WeaverError: the first error of a stage, or another process works in the run directory; what
            was finished stays.
    """
    with locked(context.run_dir):
        for name in STAGE_FOLDERS:
            settle(context.folder(name))
        for stage, call in calls.items():
            try:
                manifest = call(context)
            except NotFiniteError as error:
                what = f"{stage}: {error.what}"
                raise WeaverError(what, why=error.why, fix=error.fix) from error
            on_stage(stage, manifest)


def plan_pipeline(context: StageContext, calls: dict[str, StageCall]) -> list[PlannedStage]:
    """Plan what ``run_pipeline`` would do with each stage, without writing anything."""
    dry = replace(context, dry_run=True)
    plan: list[PlannedStage] = []
    for stage, call in calls.items():
        before = plan[-1] if plan else None
        if before is not None and before.status == "refuse":
            plan.append(PlannedStage(stage, "refuse", f"{before.stage} is refused"))
        elif before is not None and before.status != "skip":
            complete = (context.folder(stage) / MANIFEST).exists() and not context.force
            note = "would be compared with what is there" if complete else ""
            plan.append(PlannedStage(stage, "run", f"after {before.stage}; {note}".rstrip("; ")))
        else:
            plan.append(_plan_stage(dry, stage, call))
    return plan


def _plan_stage(context: StageContext, stage: str, call: StageCall) -> PlannedStage:
    try:
        call(context)
    except WouldRun as would:
        return PlannedStage(stage, would.status)
    except WeaverError as error:
        return PlannedStage(stage, "refuse", f"{error.what} ({error.fix})")
    return PlannedStage(stage, "skip")
