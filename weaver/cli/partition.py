"""``weaver partition``."""

from __future__ import annotations

from weaver.cli.options import Calibration
from weaver.cli.stage_command import SharedOptions, StageCall, stage_command
from weaver.config.sections import PartitionConfig, RouterConfig

FLAGS = (
    *("method", "sparsity", "num_experts", "expert_width_multiple", "allocation"),
    "sequential",
)
SPELLED = {"sequential": "--sequential/--one-shot"}


@stage_command("partition", PartitionConfig, FLAGS, spelled=SPELLED)
def partition(
    settings: PartitionConfig, options: SharedOptions, *, calibration: Calibration = None
) -> StageCall:
    """Split every FFN into shared and routed experts.

    A method's own options are set by --set partition.options.NAME=VALUE.
    """
    router = options.section(RouterConfig, "router")
    from weaver.stages.partition import partition as stage

    return lambda context: stage(context, settings, router, calibration)
