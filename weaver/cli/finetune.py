"""``weaver finetune``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import ConfigFile, Data, DataDir, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config.finetuning import FinetuneConfig
from weaver.config.loading import load_section, load_seed


def finetune(
    run_dir: RunDir,
    data: Data = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="cmoe-2k, distill-2k, dive or downcycle; other flags replace the preset's values."
        ),
    ] = None,
    trainable: Annotated[
        str | None,
        typer.Option(help="all, router for the routers alone, or lora for low-rank adapters."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="distill for the dense model's predictions, or next-token."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per step.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    report_to: Annotated[
        str | None, typer.Option(help="Curves for tensorboard, trackio or wandb.")
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Divide the weights among the processes (FSDP).")
    ] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
    data_dir: DataDir = None,
) -> None:
    """Train the converted model for some steps, and keep its best weights on held-out text.

    torchrun or accelerate launch start several processes that train together.
    """
    flags = {
        "data": data,
        "preset": preset,
        "trainable": trainable,
        "objective": objective,
        "steps": steps,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "learning_rate": learning_rate,
        "checkpoint_every": checkpoint_every,
    }
    settings = load_section(FinetuneConfig, "finetune", config, overrides or [], flags)
    from weaver.stages.finetune import finetune as stage

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=data_dir,
    )
    run_stage(context, "finetune", lambda c: stage(c, settings, report_to=report_to, shard=shard))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("finetune", rich_help_panel="Stages")(finetune)
