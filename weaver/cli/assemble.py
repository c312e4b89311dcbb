"""``weaver assemble``."""

from __future__ import annotations

from weaver.cli.stage_command import SharedOptions, StageCall, stage_command
from weaver.config.sections import AssembleConfig


@stage_command("assemble", AssembleConfig, ("dtype", "max_shard_size", "smoke_test"))
def assemble(settings: AssembleConfig, _options: SharedOptions) -> StageCall:
    """Write the converted model as a Hugging Face model folder."""
    from weaver.stages.assemble import assemble as stage

    return lambda context: stage(context, settings)
