"""The tasks of ``eval``: opened before any work, scored and resumed item by item."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.artifacts.manifest import InputRef
from weaver.artifacts.results import TaskResult
from weaver.artifacts.store import disk_errors, file_digest, read_json, write_text
from weaver.config.sections import EvalConfig
from weaver.data.sources import find_path
from weaver.evaluation.harness import (
    HarnessTasks,
    open_harness,
    read_harness_output,
    run_harness,
    split_tasks,
)
from weaver.evaluation.scoring import Score
from weaver.evaluation.task_files import TaskFile, read_task
from weaver.evaluation.tasks import run_task
from weaver.rundir.stage_run import StageContext

# Folder of the scores of every item, and of the harness's own output.
FOLDER = "tasks"
Append = Callable[[tuple[Score, ...]], None]


@dataclass(frozen=True)
class EvalTasks:
    """Tasks of an evaluation: the items of local files by requested name, and the harness's."""

    files: dict[str, TaskFile]
    harness: HarnessTasks | None
    refs: dict[str, InputRef]


def open_tasks(context: StageContext, config: EvalConfig) -> EvalTasks:
    """Read every task file, and let the harness load its tasks.

    Raises:
        WeaverError: a file is missing or damaged; the harness or its data are not there.
    """
    local, names = split_tasks(config.tasks)
    paths = {name: find_path(name, context.data_dir) for name in local}
    refs = {
        f"task {name}": InputRef(path=str(path), digest=file_digest(path))
        for name, path in paths.items()
    }
    harness = None
    if names:
        include = find_path(config.include_path, context.data_dir) if config.include_path else None
        harness = open_harness(names, include_path=include, shots=config.shots)
        refs["harness"] = InputRef(path="lm-evaluation-harness", digest=harness.digest)
    files = {name: read_task(path, config.task_limit) for name, path in paths.items()}
    return EvalTasks(files, harness, refs)


def run_tasks(
    context: StageContext,
    config: EvalConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: EvalTasks,
    *,
    folder: Path,
    label: str,
) -> dict[str, TaskResult]:
    """Score a model on all tasks; what an interrupted run has scored is taken over.

    Args:
        context: progress.
        config: the number of items.
        model: a causal LM.
        tokenizer: its tokenizer.
        tasks: from ``open_tasks``.
        folder: of the stage.
        label: which model it is, part of the file names below ``tasks/``.
    """
    results: dict[str, TaskResult] = {}
    for number, (name, task) in enumerate(tasks.files.items()):
        path = folder / FOLDER / f"{label}-{number}-{task.name}.jsonl"
        done = _read_scores(path)
        left = len(task.items) - len(done)
        with context.progress(f"{label} {task.name}", left) as advance, _append(path) as append:

            def keep(scores: tuple[Score, ...], append: Append = append) -> None:
                append(scores)
                advance("item")

            results[name] = run_task(model, tokenizer, task, done=done, on_item=keep)
    if tasks.harness is not None:
        path = folder / FOLDER / f"{label}-harness.json"
        if path.exists():
            results |= read_harness_output(read_json(path, rebuild="weaver eval --force"))
        else:
            output = run_harness(model, tokenizer, tasks.harness, limit=config.task_limit)
            write_text(path, json.dumps(output.raw, indent=1, default=str) + "\n")
            results |= output.scores
    return results


def _read_scores(path: Path) -> list[tuple[Score, ...]]:
    """Scores of whole lines; what a killed process left of the last one is cut off."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [tuple(Score(*score) for score in json.loads(line)) for line in whole.splitlines()]


@contextmanager
def _append(path: Path) -> Iterator[Append]:
    """Write the scores of an item as one line, at once."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a", encoding="utf-8")

    def append(scores: tuple[Score, ...]) -> None:
        rows = [[score.log_likelihood, score.greedy] for score in scores]
        with disk_errors(path.parent):
            handle.write(json.dumps(rows) + "\n")
            handle.flush()

    with handle:
        yield append
