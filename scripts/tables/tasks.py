"""Zero-shot accuracy: docs/tasks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean

import torch

from tables.rows import Measured
from weaver.artifacts.results import TaskResult
from weaver.evaluation.bootstrap import paired_bootstrap
from weaver.report.tables import format_percent, markdown_table

# Of this task accuracy per character of the ending is usually reported, of others the plain one.
PER_CHARACTER = "hellaswag"
Hits = list[tuple[int, ...]]


def tasks(measured: Measured) -> str:
    """Accuracies with weave's lead over each method of its sparsity, over all tasks and by task."""
    dense = measured.rows[0].result.dense.tasks
    names = [task.name for task in dense.values()]
    rows: list[Sequence[str]] = [("dense", "-", *_means(_hits(dense)), "-")]
    leads: list[Sequence[str]] = []
    weave: Hits = []
    for row in measured.rows:
        hits, sparsity = _hits(row.result.moe.tasks), format_percent(row.sparsity)
        is_weave = row.compared.kl_difference is None
        weave = hits if is_weave else weave
        over_all = (list(chain(*each)) for each in (weave, hits))
        rows.append((row.name, sparsity, *_means(hits), "-" if is_weave else _lead(*over_all)))
        if not is_weave:
            cells = (_lead(*pair) for pair in zip(weave, hits, strict=True))
            leads.append((row.name, sparsity, *cells))
    headers = ("model", "FFN sparsity", *names, "mean", "weave ahead by (95% interval)")
    by_task = markdown_table(("weave against", "FFN sparsity", *names), leads)
    return f"{markdown_table(headers, rows)}\n{by_task}"


def _hits(results: Mapping[str, TaskResult]) -> Hits:
    """Hit (1) or miss (0) of every item, task by task."""
    return [
        result.correct["acc_norm" if result.name.startswith(PER_CHARACTER) else "acc"]
        for result in results.values()
    ]


def _means(hits: Hits) -> list[str]:
    """Accuracy of every task, and their mean."""
    means = [mean(task) for task in hits]
    return [format_percent(value) for value in (*means, mean(means))]


def _lead(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Difference of accuracies, paired by item."""
    interval = paired_bootstrap(ours, theirs, torch.Generator().manual_seed(0))
    return "{:+.1%} ({:+.1%} to {:+.1%})".format(*interval)
