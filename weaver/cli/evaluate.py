"""``weaver eval``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import ConfigFile, Data, DataDir, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config.loading import load_section, load_seed
from weaver.config.sections import EvalConfig


def evaluate(
    run_dir: RunDir,
    data: Data = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows; default: 14.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="A .jsonl of {query, choices, gold} or {context, continuation}, HellaSwag's "
            ".txt.bz2, or harness:NAME. May be repeated.",
        ),
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Items per task.")] = None,
    router: Annotated[
        bool | None,
        typer.Option(
            "--router/--no-router",
            help="Also report, per layer, how well the router agrees with the choice that knows "
            "the experts' outputs, and how much the split depends on the calibration text.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as the dense model), float32, bfloat16, float16.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
    data_dir: DataDir = None,
) -> None:
    """Measure perplexity, KL and top-1 agreement against the dense model, usage and tasks."""
    flags = {
        "data": data,
        "sequence_length": sequence_length,
        "windows": windows,
        "tasks": tasks,
        "task_limit": task_limit,
        "router": router,
        "dtype": dtype,
    }
    settings = load_section(EvalConfig, "eval", config, overrides or [], flags)
    from weaver.stages.evaluate import evaluate as stage

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=data_dir,
    )
    run_stage(context, "eval", lambda c: stage(c, settings))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("eval", rich_help_panel="Stages")(evaluate)
