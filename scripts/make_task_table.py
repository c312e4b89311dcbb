"""Make docs/tasks.md: zero-shot accuracy of the conversions that docs/results.md compares.

Scores the models that ``make_results.py`` leaves in the run directories of its main table, item by
item, and the dense model once. Every finished task is a JSON file below --runs, so that an
interrupted script goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from results_rows import RUNS, SPARSITIES, main_rows
from transformers import AutoTokenizer, PreTrainedModel

from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.manifest import MANIFEST
from weaver.artifacts.results import TaskResult
from weaver.artifacts.store import write_json
from weaver.cli.session import make_context, quiet_libraries
from weaver.config.sections import ModelConfig
from weaver.data.sources import find_path
from weaver.evaluation.bootstrap import paired_bootstrap
from weaver.evaluation.task_files import read_task
from weaver.evaluation.tasks import run_task
from weaver.models.checkpoint import Checkpoint
from weaver.models.loading import load_model
from weaver.report.tables import format_percent, markdown_table
from weaver.rundir.converted_model import open_converted

# Task files below --data-dir, and the accuracy that is usually reported of each.
TASKS = {
    "mc/arc_easy.jsonl": "acc",
    "mc/piqa.jsonl": "acc",
    "hellaswag/hellaswag_val_full.txt.bz2": "acc_norm",
    "mc/lambada_openai.jsonl": "acc",
}
METHODS = ("weave", "flap", "cmoe", "expertweaver")
DENSE = "dense"


@dataclass(frozen=True)
class Scored:
    """A model and its results, in the order of ``TASKS``.

    Args:
        name: of the method.
        sparsity: of the FFN; None for the dense model.
        tasks: one result per task.
    """

    name: str
    sparsity: float | None
    tasks: tuple[TaskResult, ...]

    def hits(self, task: int) -> list[float]:
        """Hit (1) or miss (0) of every item of a task, by the accuracy that is reported."""
        metric = list(TASKS.values())[task]
        return [float(hit) for hit in self.tasks[task].correct[metric]]


def score(
    folder: Path,
    load: Callable[[], PreTrainedModel],
    tokenizer_from: Path,
    data_dir: Path,
    limit: int,
) -> tuple[TaskResult, ...]:
    """Results of one model, kept in ``folder``; the model is loaded only if a task is missing."""
    model: PreTrainedModel | None = None
    results = []
    for name in TASKS:
        file = find_path(name, data_dir)
        path = folder / f"{file.name.partition('.')[0]}.json"
        if not path.exists():
            print(folder.name, file.name, flush=True)
            model = model or load()
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
            result = run_task(model, tokenizer, read_task(file, limit))
            write_json(path, result.model_dump(mode="json"))
        results.append(TaskResult.model_validate_json(path.read_text()))
    return tuple(results)


def table(scored: Sequence[Scored]) -> str:
    """Accuracies, and weave's lead over each method of the same sparsity."""
    names = [result.name for result in scored[0].tasks]
    headers = ("model", "FFN sparsity", *names, "mean", "weave ahead by (95% interval)")
    weaves = {each.sparsity: each for each in scored if each.name == "weave"}
    rows = []
    for each in scored:
        hits = [each.hits(task) for task in range(len(names))]
        means = [sum(values) / len(values) for values in hits]
        rows.append(
            (
                each.name,
                "-" if each.sparsity is None else format_percent(each.sparsity),
                *(format_percent(mean) for mean in means),
                format_percent(sum(means) / len(means)),
                lead(weaves.get(each.sparsity), each),
            )
        )
    return markdown_table(headers, rows)


def lead(weave: Scored | None, other: Scored) -> str:
    """Difference of the accuracies over all items, paired by item."""
    if weave is None or weave is other:
        return "-"
    ours, theirs = (
        [hit for task in range(len(TASKS)) for hit in each.hits(task)] for each in (weave, other)
    )
    interval = paired_bootstrap(ours, theirs, torch.Generator().manual_seed(0))
    return "{:+.1%} ({:+.1%} to {:+.1%})".format(*interval)


def lead_per_task(scored: Sequence[Scored]) -> str:
    """weave's lead on every task by itself."""
    names = [result.name for result in scored[0].tasks]
    weaves = {each.sparsity: each for each in scored if each.name == "weave"}
    rows = []
    for each in scored:
        weave = weaves.get(each.sparsity)
        if weave is None or weave is each:
            continue
        cells = []
        for task in range(len(names)):
            generator = torch.Generator().manual_seed(0)
            interval = paired_bootstrap(weave.hits(task), each.hits(task), generator)
            cells.append("{:+.1%} ({:+.1%} to {:+.1%})".format(*interval))
        rows.append((each.name, format_percent(each.sparsity or 0.0), *cells))
    return markdown_table(("weave against", "FFN sparsity", *names), rows)


def main() -> None:
    """Score every model that is there and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--runs", type=Path, default=RUNS, help="As of make_results.py.")
    parser.add_argument("--limit", type=int, default=500, help="Items per task.")
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--out", type=Path, default=Path("docs/tasks.md"))
    arguments = parser.parse_args()
    quiet_libraries()
    dense, limit = arguments.model, arguments.limit
    dtype = Checkpoint(ModelConfig(path=str(dense))).dtype

    def scores(label: str, load: Callable[[], PreTrainedModel]) -> tuple[TaskResult, ...]:
        folder = arguments.runs / "tasks" / f"{label}-{limit}"
        return score(folder, load, dense, arguments.data_dir, limit)

    scored = [Scored(DENSE, None, scores(DENSE, lambda: load_model(dense, dtype)))]
    for sparsity in arguments.sparsity:
        for row in main_rows(sparsity):
            run_dir = arguments.runs / "main" / row.folder
            if row.name not in METHODS or not (run_dir / "model" / MANIFEST).exists():
                continue
            context = make_context(run_dir)
            converted = open_converted(context, finetuned=False)
            load = lambda converted=converted: converted.load("auto")  # noqa: E731
            scored.append(Scored(row.name, sparsity, scores(row.folder, load)))
    text = HEADER.format(model=dense.name, limit=limit, dtype=dtype_name(dtype))
    arguments.out.write_text(f"{text}\n{table(scored)}\n\n{lead_per_task(scored)}\n")


HEADER = """# Zero-shot tasks

Made by `scripts/make_task_table.py` on {model}, from the models of the table "Multi-task and
multi-domain calibration" in [results.md](results.md): the first {limit} items of ARC-easy, PIQA,
HellaSwag (validation) and LAMBADA (OpenAI's version), {dtype}, no training. Accuracy by summed
log-likelihood, of HellaSwag per character of the ending; LAMBADA counts greedy hits of the whole
last word. Differences are paired by item, with bootstrap intervals; "mean" and the first table's
differences weigh every task alike.
"""

if __name__ == "__main__":
    main()
