"""The tables of docs/results.md, from finished runs."""

from __future__ import annotations

from typing import Any

import torch
from results_rows import Setting

from weaver.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from weaver.evaluation.frontier import kl_at_flops
from weaver.report.tables import format_number, format_percent, markdown_table

# The rows between which weave's KL is interpolated.
FRONTIER = ("weave", "weave, one slice less")


def table(results: list[dict[str, Any]]) -> str:
    """One row per run."""
    headers = (
        "method",
        "FFN sparsity",
        "KL (95% interval)",
        "KL less weave's (95% interval)",
        "weave's KL over it, equal FLOPs",
        "perplexity",
        "top-1 agreement",
        "FFN FLOPs, measured",
        "router agreement (by chance)",
    )
    rows = []
    first: dict[str, Any] | None = None
    weave = [(_flops(each), each["kl"]) for each in results if each["row"].name in FRONTIER]
    for result in results:
        sparsity = result["row"].partition.sparsity
        generator = torch.Generator().manual_seed(0)
        mean, low, high = bootstrap_interval(result["windows"]["kl"], generator)
        if result["row"].name == "weave":
            first = result["windows"]
        rows.append(
            (
                result["row"].label,
                format_percent(sparsity),
                f"{mean:.3f} ({low:.3f}-{high:.3f})",
                against(result["windows"]["kl"], first["kl"] if first else None),
                _over(kl_at_flops(weave, _flops(result)), result),
                format_number(result["moe"]["perplexity"]),
                format_percent(result["top1_agreement"]),
                f"{_flops(result):.3f}",
                router_agreement(result["fidelity"]),
            )
        )
    return markdown_table(headers, rows)


def against(kl: list[float], weave: list[float] | None) -> str:
    """Difference from weave's KL with a paired bootstrap interval over windows."""
    if weave is None or kl == weave:
        return "-"
    interval = paired_bootstrap(kl, weave, torch.Generator().manual_seed(0))
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval)


def _flops(result: dict[str, Any]) -> float:
    measured: float = result["measured_ffn_flops_per_token"]
    return measured / float(result["dense"]["ffn_flops_per_token"])


def _over(weave: float | None, result: dict[str, Any]) -> str:
    """weave's KL at the FLOPs that a row measured, between its own settings, over the row's."""
    if weave is None or result["row"].name in FRONTIER:
        return "-"
    return f"{weave / result['kl']:.2f}"


def router_agreement(layers: list[dict[str, float]]) -> str:
    """Mean over layers of the share of chosen experts that the oracle chooses too."""
    if not layers:
        return "-"
    means = (
        sum(layer[key] for layer in layers) / len(layers)
        for key in ("oracle_agreement", "chance_agreement")
    )
    return "{:.1%} ({:.1%})".format(*means)


def router_table(results: list[dict[str, Any]]) -> str:
    """Format the router reports of runs as a Markdown table of means over the layers."""
    headers = {
        "oracle_agreement": "agreement with the oracle",
        "chance_agreement": "by chance",
        "captured_contribution": "captured contribution",
        "expert_jaccard": "experts, Jaccard",
        "shared_jaccard": "shared neurons, Jaccard",
        "score_correlation": "shared scores, Spearman",
    }
    rows = []
    for result in results:
        mean = result["router"]["mean"]
        cells = ("-" if mean[key] is None else f"{mean[key]:.3f}" for key in headers)
        rows.append((result["row"].label, *cells, load_balance(result["expert_usage"])))
    loads = "load, coefficient of variation"
    return markdown_table(("method", *headers.values(), loads), rows)


def load_balance(usage: list[dict[str, float]]) -> str:
    """Mean over layers of the coefficient of variation of the experts' loads."""
    values = [layer["coefficient_of_variation"] for layer in usage]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def describe(setting: Setting, results: list[dict[str, Any]]) -> str:
    """A setting's heading, circumstances and table."""
    first = results[0]
    evaluate, calibrate = setting.evaluate, setting.calibrate
    return "\n".join(
        [
            f"## {setting.title}",
            "",
            f"Calibration: {calibrate.tokens} tokens of {', '.join(calibrate.data)} in windows of "
            f"{calibrate.sequence_length}. Evaluation: the first {evaluate.windows} windows of "
            f"{evaluate.sequence_length} tokens of {', '.join(evaluate.data)} "
            f"({first['tokens']} predicted tokens). Dense perplexity "
            f"{format_number(first['dense']['perplexity'])}.",
            "",
            router_table(results) if evaluate.router else table(results),
        ]
    )
