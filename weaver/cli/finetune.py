"""``weaver finetune``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.stage_command import SharedOptions, StageCall, stage_command
from weaver.config.finetuning import FinetuneConfig

FLAGS = (
    *("data", "preset", "trainable", "objective", "steps", "batch_size", "sequence_length"),
    *("learning_rate", "checkpoint_every"),
)


@stage_command("finetune", FinetuneConfig, FLAGS, reads_text=True)
def finetune(
    settings: FinetuneConfig,
    _options: SharedOptions,
    *,
    report_to: Annotated[
        str | None, typer.Option(help="Curves for tensorboard, trackio or wandb.")
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Divide the weights among the processes (FSDP).")
    ] = False,
) -> StageCall:
    """Train the converted model for some steps, and keep its best weights on held-out text.

    torchrun or accelerate launch start several processes that train together.
    """
    from weaver.stages.finetune import finetune as stage

    return lambda context: stage(context, settings, report_to=report_to, shard=shard)
