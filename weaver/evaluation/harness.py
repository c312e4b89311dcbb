"""lm-evaluation-harness, the extra ``weaver-moe[eval]``, behind the names ``harness:TASK``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.artifacts.results import TaskResult
from weaver.artifacts.store import canonical_json, file_digest, text_digest
from weaver.errors import WeaverError

PREFIX = "harness:"
# What is kept of the harness's output: the rest is dates, paths and the machine.
RAW_KEYS = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "samples")


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks of the harness that are known to be there with their data; see ``open_harness``.

    Args:
        names: task, group or tag names.
        manager: the harness's ``TaskManager``.
        shots: examples before every item; None as each task has it.
        digest: over the harness's version and one's own task files.
    """

    names: tuple[str, ...]
    manager: Any
    shots: int | None
    digest: str


@dataclass(frozen=True)
class HarnessOutput:
    """Scores by ``harness:NAME``, and the harness's own results and samples."""

    scores: dict[str, TaskResult]
    raw: dict[str, Any]


def split_tasks(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Task names of a config as (local files, harness tasks without their prefix)."""
    local = tuple(name for name in names if not name.startswith(PREFIX))
    harness = tuple(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
    return local, harness


def open_harness(
    tasks: Sequence[str], *, include_path: Path | None = None, shots: int | None = None
) -> HarnessTasks:
    """Load tasks and their data, so that whatever is missing is found before any work.

    Args:
        tasks: the harness's task, group or tag names.
        include_path: folder with task files (YAML) of one's own.
        shots: examples before every item; None as each task has it.

    Raises:
        WeaverError: lm-eval is not installed, does not know a task, or cannot load a task's data.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise WeaverError(
            f"harness tasks {', '.join(tasks)}: lm-evaluation-harness cannot be imported",
            why=f"it is an optional dependency of weaver ({error})",
            fix="pip install 'weaver-moe[eval]'",
        ) from error
    own = _own_files(include_path)
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise WeaverError(
            f"harness tasks {', '.join(unknown)}: not known to lm-evaluation-harness",
            why="names after harness: are its task, group or tag names",
            fix="lm-eval ls tasks, or --include-path FOLDER for task files of your own",
        )
    for name in tasks:
        _load(manager, name)
    digest = text_digest(canonical_json({"lm-eval": _version(), **own}))
    return HarnessTasks(tuple(tasks), manager, shots, digest)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: HarnessTasks,
    *,
    limit: int | None = None,
) -> HarnessOutput:
    """Score a model with lm-evaluation-harness, with its own prompts and data.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        tasks: from ``open_harness``.
        limit: number of items per task; all when None.
    Returns:
        Scores of every task and group that the harness reports. Metrics without a filter keep their
        name (``acc``), others are ``metric,filter``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # The harness guesses the kind of model from its model_type, which for a converted model it
    # has never heard of.
    adapter = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer)
    output = simple_evaluate(
        model=adapter,
        tasks=list(tasks.names),
        num_fewshot=tasks.shots,
        limit=limit,
        task_manager=tasks.manager,
        log_samples=True,
    )
    return HarnessOutput(
        read_harness_output(output), {key: output[key] for key in RAW_KEYS if key in output}
    )


def read_harness_output(output: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Scores by ``harness:NAME`` from what ``lm_eval.simple_evaluate`` returns."""
    scores = {}
    for name, values in output["results"].items():
        metrics, items = _metrics(values), _items(output, name)
        scores[f"{PREFIX}{name}"] = TaskResult(
            name=f"{PREFIX}{name}",
            kind="harness",
            items=items,
            shots=int(output.get("n-shot", {}).get(name) or 0),
            metrics=metrics,
            correct=_hits(output.get("samples", {}).get(name, ()), metrics, items),
        )
    return scores


def _own_files(include_path: Path | None) -> dict[str, str]:
    """Digests of one's own task files by name."""
    if include_path is None:
        return {}
    if not include_path.is_dir():
        raise WeaverError(
            f"{include_path}: no such folder",
            why="--include-path names a folder with task files for lm-evaluation-harness",
            fix="name the folder that holds the .yaml files",
        )
    paths = sorted(path for path in include_path.rglob("*") if path.suffix in {".yaml", ".py"})
    return {str(path.relative_to(include_path)): file_digest(path) for path in paths}


def _load(manager: Any, name: str) -> None:
    try:
        manager.load([name])
    # Datasets, the hub and a task's own code raise what they like.
    except Exception as error:
        raise WeaverError(
            f"harness task {name}: lm-evaluation-harness cannot load it",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            fix="run it once where the hub is reachable, which keeps the data in its cache, or "
            "name a task file with local data by --include-path FOLDER",
        ) from error


def _version() -> str:
    return version("lm_eval")


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values; aliases and the standard error "N/A" are texts."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float))
    }


def _hits(
    samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, float], items: int
) -> dict[str, tuple[int, ...]]:
    """Per metric that is a mean of hits, the hit or miss of every item in the task's order."""
    found = {}
    for metric in metrics:
        name, _, chosen = metric.partition(",")
        rows = [row for row in samples if row.get("filter", "none") == (chosen or "none")]
        values = [row.get(name) for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
        if len(values) == items > 0 and all(value in (0, 1) for value in values):
            found[metric] = tuple(int(value) for value in values if value is not None)
    return found


def _items(output: Mapping[str, Any], name: str) -> int:
    """Items scored of a task, or of all tasks in a group."""
    samples = output.get("n-samples", {})
    if name in samples:
        return int(samples[name]["effective"])
    return sum(_items(output, child) for child in output.get("group_subtasks", {}).get(name, ()))
