"""lm-evaluation-harness, the extra ``weaver-moe[eval]``, behind the names ``harness:TASK``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.artifacts.results import TaskResult
from weaver.errors import WeaverError

PREFIX = "harness:"


def split_tasks(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Task names of a config as (local files, harness tasks without their prefix)."""
    local = tuple(name for name in names if not name.startswith(PREFIX))
    harness = tuple(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    return local, harness


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
) -> dict[str, TaskResult]:
    """Score a model with lm-evaluation-harness, with its own prompts and data.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        tasks: the harness's task or group names.
        limit: number of items per task; all when None.
    Returns:
        Scores by ``harness:NAME``, every task and group that the harness reports. Metrics without
        a filter keep their name (``acc``), others are ``metric,filter``; per-item hits are not
        kept.
    Raises:
        WeaverError: lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise WeaverError(
            f"harness tasks {', '.join(tasks)}: lm-evaluation-harness cannot be imported",
            why=f"it is an optional dependency of weaver ({error})",
            fix="pip install 'weaver-moe[eval]'",
        ) from error
    manager = TaskManager()
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise WeaverError(
            f"harness tasks {', '.join(unknown)}: not known to lm-evaluation-harness",
            why="names after harness: are its task, group or tag names",
            fix="lm-eval ls tasks",
        )
    # The harness guesses the kind of model from its model_type, which for a converted model it
    # has never heard of.
    adapter = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer)
    output = simple_evaluate(
        model=adapter, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
    )
    return read_harness_output(output)


def read_harness_output(output: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Scores by ``harness:NAME`` from what ``lm_eval.simple_evaluate`` returns."""
    return {
        f"{PREFIX}{name}": TaskResult(
            name=f"{PREFIX}{name}",
            kind="harness",
            items=_items(output, name),
            metrics=_metrics(values),
        )
        for name, values in output["results"].items()
    }


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values; aliases and the standard error "N/A" are texts."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float))
    }


def _items(output: Mapping[str, Any], name: str) -> int:
    """Items scored of a task, or of all tasks in a group."""
    samples = output.get("n-samples", {})
    if name in samples:
        return int(samples[name]["effective"])
    return sum(_items(output, child) for child in output.get("group_subtasks", {}).get(name, ()))
