"""``weaver eval``."""

from __future__ import annotations

from weaver.cli.stage_command import SharedOptions, StageCall, stage_command
from weaver.config.sections import EvalConfig

FLAGS = (
    *("data", "sequence_length", "windows", "tasks", "task_limit", "include_path", "shots"),
    *("router", "dtype"),
)


@stage_command("eval", EvalConfig, FLAGS, spelled={"tasks": "--task"}, reads_text=True)
def evaluate(settings: EvalConfig, _options: SharedOptions) -> StageCall:
    """Measure perplexity, KL and top-1 agreement against the dense model, usage and tasks."""
    from weaver.stages.evaluate import evaluate as stage

    return lambda context: stage(context, settings)
