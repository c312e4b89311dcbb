"""Tables that subcommands print: summary of a stage, plan of a dry run, stages of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from weaver.cli.show_speeds import show_bench
from weaver.cli.show_two_level import by_level
from weaver.report.affinity_table import affinity_experts, affinity_table
from weaver.report.comparison import HEADERS, comparison_rows
from weaver.report.tables import (
    console_table,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_ratio,
    format_seconds,
)

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.rundir.inspection import StageState
    from weaver.stages.estimate import Estimate
    from weaver.stages.pipeline import PlannedStage


# What to do about a conversion that the smoke test finds degenerate.
_LESS = (
    "convert again with a lower --sparsity, more calibration --tokens or --method weave; "
    "weaver generate shows what a model writes, weaver eval measures it in full"
)
_FINITE = "weaver assemble with --dtype float32 and --force; weaver generate shows what it writes"


def show_manifest(console: Console, stage: str, manifest: StageManifest, folder: Path) -> None:
    """One line about a finished stage, and the table of its summary."""
    console.print(
        f"[green]{stage}[/green] {folder}  digest {manifest.digest[:12]}  "
        f"{format_seconds(manifest.seconds)}, peak {format_bytes(manifest.peak_memory_bytes)}"
    )
    _SUMMARIES[stage](console, manifest.summary)


def _show_calibrate(console: Console, summary: dict[str, Any]) -> None:
    sites = summary.get("sites")
    ffns = f"FFNs of up to {summary['intermediate_size']} neurons" if sites else "layers"
    size = "" if sites else f", {summary['intermediate_size']} neurons each"
    console.print(
        f"  {len(sites or []) or summary['num_layers']} {ffns}{size}; "
        f"{summary['tokens']} tokens in {summary['samples']} samples of "
        f"{len(summary['groups'])} groups"
    )


def _show_partition(console: Console, summary: dict[str, Any]) -> None:
    speeds = list(summary["layers"][0]["predicted_speedups"])
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
        for row in by_level(summary["layers"])
    ]
    console.print(console_table(f"{summary['method']} (scope: ffn)", headers, rows))
    if "affinity" in summary:
        console.print(console_table(*affinity_table(summary["affinity"])))
        console.print("\n".join(affinity_experts(summary["affinity"])), markup=False)


def _show_router(console: Console, summary: dict[str, Any]) -> None:
    if not summary["layers"]:
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
        for row in by_level(summary["layers"])
    ]
    console.print(console_table(f"router {summary['router']}", headers, rows))
    errors = [
        (part["error"], row["layer"], part) for row in summary["layers"] for part in row["errors"]
    ]
    if errors:
        error, layer, part = max(errors, key=lambda each: each[0])
        console.print(
            f"  largest error of an FFN's output: {format_percent(error)} of its energy, layer "
            f"{layer}, {_positions(part)}"
        )


def _positions(part: dict[str, Any]) -> str:
    """ "position 2", "positions 3-16" or "positions 129 on"."""
    if part["last"] is None:
        return f"positions {part['first']} on"
    if part["last"] == part["first"]:
        return f"position {part['first']}"
    return f"positions {part['first']}-{part['last']}"


def _show_assemble(console: Console, summary: dict[str, Any]) -> None:
    before = summary.get("dense_active_parameters", summary["dense_parameters"])
    if before < summary["dense_parameters"]:
        console.print(
            f"  before: {format_count(before)} of {format_count(summary['dense_parameters'])} "
            "parameters active"
        )
    console.print(
        f"  {format_count(summary['active_parameters'])} of "
        f"{format_count(summary['total_parameters'])} parameters active, FFN sparsity "
        f"{format_percent(summary['ffn_sparsity'])}, FFN FLOPs x"
        f"{summary['ffn_flops'] / summary['dense_ffn_flops']:.3f}"
    )
    # Manifests of earlier versions have none.
    if (tested := summary.get("smoke_test")) is not None:
        _show_smoke_test(console, tested)


def _show_smoke_test(console: Console, tested: dict[str, Any]) -> None:
    if "skipped" in tested:
        console.print(f"  smoke test skipped: {tested['skipped']}")
        return
    kl = "not finite" if tested["kl"] is None else format_number(tested["kl"])
    console.print(
        f"  smoke test: KL {kl} over {tested['tokens']} tokens, repetition "
        f"{format_percent(tested['repetition'])} "
        f"(dense {format_percent(tested['dense_repetition'])})"
    )
    if tested["degenerate"]:
        fix = _FINITE if tested["kl"] is None else _LESS
        console.print(
            f"  [yellow]warning: degenerate: {'; '.join(tested['degenerate'])}[/yellow]\n"
            f"    fix: {fix}"
        )


def _show_export(console: Console, summary: dict[str, Any]) -> None:
    console.print(f"  {summary['target']}: {summary['reason']}", markup=False)
    for line in summary["approximations"]:
        console.print(f"  approximated: {line}", markup=False)
    if "cost" in summary:
        show_verification(console, "cost of the approximation", summary["cost"])


def show_verification(console: Console, title: str, result: dict[str, Any]) -> None:
    """Print the agreement of an export with its model: KL, perplexities, top-1, greedy text."""
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "kl": ("KL to the model, nats/token", "{:.2e}".format),
        "native_perplexity": ("perplexity of the model", format_number),
        "export_perplexity": ("perplexity of the export", format_number),
        "max_logprob_difference": ("largest difference of top-10 log-probabilities", format_number),
        "mean_logprob_difference": ("their mean difference", format_number),
        "top1_agreement": ("top-1 agreement", _share),
        "topk_agreement": ("agreement of selected experts", _share),
        "same_text": ("greedy text before the first difference", _share),
    }
    rows: list[tuple[str, object]] = [("run by", result["loaded_as"]), ("dtype", result["dtype"])]
    rows.append(("tokens", result["tokens"]))
    rows += [
        (name, form(result[key])) for key, (name, form) in forms.items() if result[key] is not None
    ]
    console.print(console_table(title, ("", "export"), rows))


def _share(value: float) -> str:
    """More digits than a percentage usually has: exports are judged by the last ones."""
    return f"{value:.3%}"


def _show_finetune(console: Console, summary: dict[str, Any]) -> None:
    losses = summary["losses"]
    console.print(f"  {len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    first, seen = summary["evaluations"][0], summary["evaluations"]
    best = next(each for each in seen if each["step"] == summary["best_step"])
    console.print(
        f"  held-out KL {format_number(first['kl'])} -> {format_number(best['kl'])}, perplexity "
        f"{format_number(first['perplexity'])} -> {format_number(best['perplexity'])} (dense "
        f"{format_number(best['dense_perplexity'])}): the weights of step {best['step']}"
    )


def _show_eval(console: Console, summary: dict[str, Any]) -> None:
    predicted = summary["predicted_kl"]
    note = "" if predicted is None else f" (predicted {format_number(predicted)})"
    console.print(
        f"  perplexity {format_number(summary['dense_perplexity'])} -> "
        f"{format_number(summary['moe_perplexity'])}, KL {format_number(summary['kl'])}{note}, "
        f"top-1 agreement {format_percent(summary['top1_agreement'])}, measured FFN FLOPs x"
        f"{summary['measured_ffn_flops'] / summary['dense_ffn_flops']:.3f}"
    )
    parts = (
        f"{format_number(part['kl'])} at {_positions(part)}" for part in summary["kl_by_position"]
    )
    console.print(f"  KL {', '.join(parts)}")
    for label, dense, moe in summary["tasks"]:
        console.print(f"  {label}: {dense} -> {moe}", markup=False)
    if summary["router"] is not None:
        _show_router_report(console, summary["router"])


def _show_router_report(console: Console, report: dict[str, Any]) -> None:
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
            *((row["layer"], row) for row in report["layers"]),
            ("mean", report["mean"]),
        ]
    ]
    title = (
        f"router on {report['tokens']} held-out tokens; {report['method']} on halves of "
        f"{' and '.join(str(count) for count in report['half_tokens'])} calibration tokens"
    )
    headers = ("layer", *(header for header, _ in columns.values()))
    console.print(console_table(title, headers, rows))


_SUMMARIES: dict[str, Callable[[Console, dict[str, Any]], None]] = {
    "calibrate": _show_calibrate,
    "partition": _show_partition,
    "build-router": _show_router,
    "assemble": _show_assemble,
    "finetune": _show_finetune,
    "export": _show_export,
    "eval": _show_eval,
    "bench": show_bench,
}


def show_plan(console: Console, plan: Sequence[PlannedStage], needs: Estimate) -> None:
    """Print the plan of a dry run, a row per stage, and the estimate of memory and disk."""
    rows = [(stage.stage, stage.status, stage.note) for stage in plan]
    console.print(console_table("dry run", ("stage", "would", "note"), rows))
    console.print(
        f"estimate: {format_bytes(needs.memory)} of memory layer by layer, "
        f"{format_bytes(needs.eval_memory)} for eval and bench (both models); disk "
        f"{format_bytes(needs.profile_disk)} for profiles, {format_bytes(needs.model_disk)} "
        "for the model"
    )


def show_states(console: Console, states: Sequence[StageState]) -> None:
    """The stages of a run directory."""
    rows = []
    for state in states:
        manifest = state.manifest
        rows.append(
            (
                state.stage,
                state.state,
                manifest.digest[:12] if manifest else "-",
                format_bytes(state.size),
                format_seconds(manifest.seconds) if manifest else "-",
                format_bytes(manifest.peak_memory_bytes) if manifest else "-",
                manifest.finished_at if manifest else state.note,
            )
        )
    headers = ("stage", "state", "digest", "size", "time", "peak memory", "finished")
    console.print(console_table(str(states[0].folder.parent), headers, rows))


def show_results(console: Console, run_dir: Path, *, finetuned: bool) -> None:
    """Dense against converted, from the results of eval and bench; and where the model lies."""
    quality = json.loads((run_dir / "eval" / "results.json").read_text())
    speed = json.loads((run_dir / "bench" / "results.json").read_text())
    title = f"dense against converted, FFN sparsity {format_percent(quality['ffn_sparsity'])}"
    console.print(console_table(title, HEADERS, comparison_rows(quality, speed)))
    console.print(f"model: {run_dir / ('finetune/model' if finetuned else 'model')}")
