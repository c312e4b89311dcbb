"""Tables of the stages' summaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from weaver.artifacts.bench_results import BenchResult
from weaver.artifacts.results import PositionKl, Record, RouterReport, SmokeResult
from weaver.artifacts.summaries import (
    AssembleSummary,
    CalibrateSummary,
    EvalSummary,
    ExportSummary,
    FinetuneSummary,
    PartitionSummary,
    PositionError,
    RouterSummary,
    SkippedTest,
    read_summary,
)
from weaver.artifacts.verification import Verification
from weaver.cli.show_speeds import show_bench
from weaver.cli.show_two_level import by_level
from weaver.report.affinity_table import affinity_experts, affinity_table
from weaver.report.comparison import score_cells, score_label
from weaver.report.tables import (
    console_table,
    format_count,
    format_number,
    format_percent,
    format_ratio,
)

# What to do about a conversion that the smoke test finds degenerate.
_LESS = (
    "convert again with a lower --sparsity, more calibration --tokens or --method weave; "
    "weaver generate shows what a model writes, weaver eval measures it in full"
)
_FINITE = "weaver assemble with --dtype float32 and --force; weaver generate shows what it writes"


def _show_calibrate(console: Console, summary: CalibrateSummary) -> None:
    sites, neurons = summary.sites, summary.intermediate_size
    ffns = f"FFNs of up to {neurons} neurons" if sites else "layers"
    size = "" if sites else f", {neurons} neurons each"
    console.print(
        f"  {len(sites or ()) or summary.num_layers} {ffns}{size}; {summary.tokens} tokens in "
        f"{summary.samples} samples of {len(summary.groups)} groups"
    )


def _show_partition(console: Console, summary: PartitionSummary) -> None:
    speeds = list(summary.layers[0].predicted_speedups)
    headers = (
        *("layer", "shared", "shared share", "experts", "top-k", "active", "sparsity"),
        *(f"predicted speed-up, T={tokens}" for tokens in speeds),
    )
    rows = [
        (
            row["layer"],
            row["shared_neurons"],
            format_percent(row["shared_share"]),
            f"{row['experts']} x {row['expert_width']}",
            row["top_k"],
            row["active_neurons"],
            format_percent(row["sparsity"]),
            *(format_ratio(row["predicted_speedups"][tokens]) for tokens in speeds),
        )
        for row in by_level(row.model_dump() for row in summary.layers)
    ]
    console.print(console_table(f"{summary.method} (scope: ffn)", headers, rows))
    if summary.affinity is not None:
        console.print(console_table(*affinity_table(summary.affinity)))
        console.print("\n".join(affinity_experts(summary.affinity)), markup=False)


def _show_router(console: Console, summary: RouterSummary) -> None:
    if not summary.layers:
        console.print("  static layers: no router")
        return
    headers = ("layer", "oracle agreement", "by chance", "captured contribution", "load CV")
    rows = [
        (
            row["layer"],
            format_percent(row["oracle_agreement"]),
            format_percent(row["chance_agreement"]),
            format_percent(row["captured_contribution"]),
            format_number(row["load_cv"]),
        )
        for row in by_level(row.model_dump() for row in summary.layers)
    ]
    console.print(console_table(f"router {summary.router}", headers, rows))
    errors = [(part.error, row.layer, part) for row in summary.layers for part in row.errors]
    if errors:
        error, layer, part = max(errors, key=lambda each: each[0])
        console.print(
            f"  largest error of an FFN's output: {format_percent(error)} of its energy, layer "
            f"{layer}, {_positions(part)}"
        )


def _positions(part: PositionError | PositionKl) -> str:
    """ "position 2", "positions 3-16" or "positions 129 on"."""
    if part.last is None:
        return f"positions {part.first} on"
    if part.last == part.first:
        return f"position {part.first}"
    return f"positions {part.first}-{part.last}"


def _show_assemble(console: Console, summary: AssembleSummary) -> None:
    before, dense = summary.dense_active_parameters, summary.dense_parameters
    if before < dense:
        console.print(
            f"  before: {format_count(before)} of {format_count(dense)} parameters active"
        )
    console.print(
        f"  {format_count(summary.active_parameters)} of "
        f"{format_count(summary.total_parameters)} parameters active, FFN sparsity "
        f"{format_percent(summary.ffn_sparsity)}, FFN FLOPs x"
        f"{summary.ffn_flops / summary.dense_ffn_flops:.3f}"
    )
    if summary.smoke_test is not None:
        _show_smoke_test(console, summary.smoke_test)


def _show_smoke_test(console: Console, tested: SmokeResult | SkippedTest) -> None:
    if isinstance(tested, SkippedTest):
        console.print(f"  smoke test skipped: {tested.skipped}")
        return
    kl = "not finite" if tested.kl is None else format_number(tested.kl)
    console.print(
        f"  smoke test: KL {kl} over {tested.tokens} tokens, repetition "
        f"{format_percent(tested.repetition)} (dense {format_percent(tested.dense_repetition)})"
    )
    _warn_degenerate(console, tested)


def _warn_degenerate(console: Console, tested: SmokeResult) -> None:
    if tested.degenerate:
        fix = _FINITE if tested.kl is None else _LESS
        console.print(
            f"  [yellow]warning: degenerate: {'; '.join(tested.degenerate)}[/yellow]\n"
            f"    fix: {fix}"
        )


def _show_export(console: Console, summary: ExportSummary) -> None:
    console.print(f"  {summary.target}: {summary.reason}", markup=False)
    for line in summary.approximations:
        console.print(f"  approximated: {line}", markup=False)
    if summary.cost is not None:
        show_verification(console, "cost of the approximation", summary.cost)


def show_verification(console: Console, title: str, result: Verification) -> None:
    """Print the agreement of an export with its model: KL, perplexities, top-1, greedy text."""
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "kl": ("KL to the model, nats/token", "{:.2e}".format),
        "stored_kl": (f"the same in {result.stored_dtype}, as stored", "{:.2e}".format),
        "native_perplexity": ("perplexity of the model", format_number),
        "export_perplexity": ("perplexity of the export", format_number),
        "max_logprob_difference": ("largest difference of top-10 log-probabilities", format_number),
        "mean_logprob_difference": ("their mean difference", format_number),
        "top1_agreement": ("top-1 agreement", _share),
        "topk_agreement": ("agreement of selected experts", _share),
        "same_text": ("greedy text before the first difference", _share),
    }
    rows: list[tuple[str, object]] = [("run by", result.loaded_as), ("dtype", result.dtype)]
    rows.append(("tokens", result.tokens))
    values = result.model_dump()
    rows += [
        (name, form(values[key])) for key, (name, form) in forms.items() if values[key] is not None
    ]
    console.print(console_table(title, ("", "export"), rows))


def _share(value: float) -> str:
    """More digits than a percentage usually has: exports are judged by the last ones."""
    return f"{value:.3%}"


def _show_finetune(console: Console, summary: FinetuneSummary) -> None:
    losses, first, best = summary.losses, summary.evaluations[0], summary.best
    console.print(f"  {len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    console.print(
        f"  held-out KL {format_number(first.kl)} -> {format_number(best.kl)}, perplexity "
        f"{format_number(first.perplexity)} -> {format_number(best.perplexity)} (dense "
        f"{format_number(best.dense_perplexity)}): the weights of step {best.step}"
    )


def _show_eval(console: Console, summary: EvalSummary) -> None:
    predicted = summary.predicted_kl
    note = "" if predicted is None else f" (predicted {format_number(predicted)})"
    console.print(
        f"  perplexity {format_number(summary.dense_perplexity)} -> "
        f"{format_number(summary.moe_perplexity)}, KL {format_number(summary.kl)}{note}, "
        f"top-1 agreement {format_percent(summary.top1_agreement)}, measured FFN FLOPs x"
        f"{summary.measured_ffn_flops / summary.dense_ffn_flops:.3f}"
    )
    parts = (f"{format_number(part.kl)} at {_positions(part)}" for part in summary.kl_by_position)
    console.print(f"  KL {', '.join(parts)}")
    if summary.tasks:
        rows = [(score_label(score), *score_cells(score)) for score in summary.tasks]
        headers = ("task, metric", "dense", "converted", "difference")
        console.print(console_table("tasks, ± standard error", headers, rows))
    if summary.router is not None:
        _show_router_report(console, summary.router)


def _show_router_report(console: Console, report: RouterReport) -> None:
    columns: dict[str, tuple[str, Callable[[float], str]]] = {
        "oracle_agreement": ("oracle agreement", format_percent),
        "chance_agreement": ("by chance", format_percent),
        "captured_contribution": ("captured contribution", format_percent),
        "expert_jaccard": ("expert Jaccard", format_number),
        "shared_jaccard": ("shared Jaccard", format_number),
        "score_correlation": ("score correlation", format_number),
    }
    rows = [
        (
            label,
            *("-" if row[key] is None else form(row[key]) for key, (_, form) in columns.items()),
        )
        for label, row in [
            *((row.layer, row.model_dump()) for row in report.layers),
            ("mean", report.mean.model_dump()),
        ]
    ]
    title = (
        f"router on {report.tokens} held-out tokens; {report.method} on halves of "
        f"{' and '.join(str(count) for count in report.half_tokens)} calibration tokens"
    )
    headers = ("layer", *(header for header, _ in columns.values()))
    console.print(console_table(title, headers, rows))


_TABLES: dict[str, tuple[type[Record], Callable[[Console, Any], None]]] = {
    "calibrate": (CalibrateSummary, _show_calibrate),
    "partition": (PartitionSummary, _show_partition),
    "build-router": (RouterSummary, _show_router),
    "assemble": (AssembleSummary, _show_assemble),
    "finetune": (FinetuneSummary, _show_finetune),
    "export": (ExportSummary, _show_export),
    "eval": (EvalSummary, _show_eval),
    "bench": (BenchResult, show_bench),
}


def show_summary(console: Console, stage: str, values: dict[str, Any]) -> None:
    """Print the summary in the manifest of a stage."""
    kind, show = _TABLES[stage]
    show(console, read_summary(kind, values))


def show_warnings(console: Console, stage: str, values: dict[str, Any]) -> None:
    """Print what a summary warns of, and nothing else."""
    if stage == "assemble":
        tested = read_summary(AssembleSummary, values).smoke_test
        if isinstance(tested, SmokeResult):
            _warn_degenerate(console, tested)
