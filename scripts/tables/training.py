"""Conversions that are trained: docs/recovery.md, docs/dive_results.md, docs/downcycling.md."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from tables.rows import Measured, Row
from weaver.artifacts.store import write_text
from weaver.artifacts.summaries import FinetuneSummary, PartitionSummary
from weaver.report.plots import curves_plot
from weaver.report.tables import format_number, markdown_table

SHOWN_STEPS = (0, 20, 60, 100, 160)


def recovery(measured: Measured) -> str:
    """Quality before and after a fine-tuning, side by side."""
    starts = {row.name: row for row in measured.rows if row.cell.config.finetune is None}
    cells = []
    for row in measured.rows:
        if row.cell.config.finetune is None:
            continue
        method, _, name = row.name.partition(", ")
        before, after, summary = starts[method].compared, row.compared, _training(row)
        kl = (before.kl.mean, after.kl.mean)
        perplexity = (before.perplexity, after.perplexity)
        gaps = [each - after.dense_perplexity for each in perplexity]
        guarded = {each.step: each.kl for each in summary.evaluations}
        cells.append(
            (
                *(method, name, f"{summary.tokens:,}", f"{summary.seconds / 60:.1f}"),
                "{:.3f} -> {:.3f}".format(*kl),
                f"{1 - kl[1] / kl[0]:.0%}",
                "{:.1f} -> {:.1f}".format(*perplexity),
                f"{1 - gaps[1] / gaps[0]:.0%}",
                f"{guarded[0]:.3f} -> {guarded[summary.best_step]:.3f}",
                f"{before.ffn_flops:.3f} -> {after.ffn_flops:.3f}",
            )
        )
    headers = (
        *("start", "fine-tuning", "tokens", "minutes", "KL", "KL closed"),
        *("perplexity", "gap to dense closed", "KL, guard's text", "FFN FLOPs, measured"),
    )
    return markdown_table(headers, cells)


def dive(measured: Measured) -> str:
    """DIVE and FLAP before and after training, and the domains of each of DIVE's experts."""
    rows = {row.name: row for row in measured.rows}
    cells = []
    for name in ("flap", "dive"):
        before, after = rows[name].compared, rows[f"{name}, trained"].compared
        cells.append(
            (
                *(name, f"{after.total_parameters / 1e6:.0f}M"),
                f"{after.active_parameters / 1e6:.1f}M",
                *(f"{each.perplexity:.2f}" for each in (before, after)),
                *(f"{each.kl.mean:.3f}" for each in (before, after)),
                f"{_training(rows[f'{name}, trained']).tokens:,}",
            )
        )
    headers = (
        *("method", "parameters", "active", "perplexity, converted", "trained"),
        *("KL, converted", "trained", "tokens"),
    )
    dense = f"Dense perplexity {rows['dive'].compared.dense_perplexity:.2f}."
    return f"{dense}\n\n{markdown_table(headers, cells)}\n{_clusters(rows['dive'])}\n"


def _clusters(row: Row) -> str:
    affinity = row.summary(PartitionSummary, "partition").affinity
    if affinity is None:
        raise ValueError(f"{row.run_dir} has no experts for domains")
    domains: dict[int, list[str]] = {}
    for group, expert in zip(affinity.groups, affinity.experts, strict=True):
        domains.setdefault(expert, []).append(group)
    lines = [f"- expert {expert}: {', '.join(domains[expert])}" for expert in sorted(domains)]
    return "\n".join(["Domains of each of DIVE's experts:", "", *lines])


def downcycling(measured: Measured) -> str:
    """Held-out perplexity on the way, mean over the seeds, and how soon each start gets there."""
    found: dict[str, list[FinetuneSummary]] = {}
    for row in measured.rows:
        found.setdefault(row.name, []).append(_training(row))
    curves = {name: [_perplexities(each) for each in all_] for name, all_ in found.items()}
    means = {
        name: {step: mean(each[step] for each in seeds) for step in seeds[0]}
        for name, seeds in curves.items()
    }
    reference = means["random"][SHOWN_STEPS[-1]]
    cells = []
    for name, seeds in curves.items():
        reached = [_reached(curve, reference) for curve in seeds]
        first = "-" if None in reached else f"{mean(step or 0 for step in reached):.0f}"
        cells.append((name, *(f"{means[name][step]:.3f}" for step in SHOWN_STEPS), first))
    picture = measured.page.with_suffix(".svg")
    title = "held-out perplexity while training, mean over the seeds"
    points = {name: list(curve.items()) for name, curve in means.items()}
    write_text(picture, curves_plot(title, "step", points))
    headers = ("start", *(f"step {step}" for step in SHOWN_STEPS))
    last = f"steps to {reference:.3f}, random's end"
    dense = found["random"][0].evaluations[0].dense_perplexity
    return (
        f"Dense perplexity {format_number(dense)}.\n\n![Held-out perplexity by step]"
        f"({picture.name})\n\n{markdown_table((*headers, last), cells)}"
    )


def _training(row: Row) -> FinetuneSummary:
    return row.summary(FinetuneSummary, "finetune")


def _perplexities(summary: FinetuneSummary) -> dict[int, float]:
    return {each.step: each.perplexity for each in summary.evaluations}


def _reached(curve: Mapping[int, float], value: float) -> int | None:
    return next((step for step, perplexity in sorted(curve.items()) if perplexity <= value), None)
