"""Quality of conversions: docs/results.md."""

from __future__ import annotations

from statistics import mean

from tables.rows import Measured, Row
from weaver.artifacts.compared_runs import Interval
from weaver.artifacts.summaries import RouterSummary
from weaver.evaluation.frontier import kl_at_flops
from weaver.report.tables import format_number, format_percent, markdown_table

# The rows between which weave's KL is interpolated.
FRONTIER = ("weave", "weave, one slice less")
SCORES = {
    "oracle_agreement": "agreement with the oracle",
    "chance_agreement": "by chance",
    "captured_contribution": "captured contribution",
    "expert_jaccard": "experts, Jaccard",
    "shared_jaccard": "shared neurons, Jaccard",
    "score_correlation": "shared scores, Spearman",
}


def quality(measured: Measured) -> str:
    """KL, beside weave's and at its FLOPs, and what else was measured on the text."""
    weave = [(r.compared.ffn_flops, r.result.kl) for r in measured.rows if r.name in FRONTIER]
    headers = (
        *("method", "FFN sparsity", "KL (95% interval)", "KL less weave's (95% interval)"),
        *("weave's KL over it, equal FLOPs", "perplexity", "top-1 agreement"),
        *("FFN FLOPs, measured", "router agreement (by chance)"),
    )
    rows = [
        (
            _label(row),
            format_percent(row.sparsity),
            "{:.3f} ({:.3f}-{:.3f})".format(*_values(row.compared.kl)),
            _against(row.compared.kl_difference),
            "-" if row.name in FRONTIER else _over(kl_at_flops(weave, row.compared.ffn_flops), row),
            format_number(row.compared.perplexity),
            format_percent(row.compared.top1_agreement),
            f"{row.compared.ffn_flops:.3f}",
            _router_agreement(row),
        )
        for row in measured.rows
    ]
    return f"{_circumstances(measured.rows[0])}\n\n{markdown_table(headers, rows)}"


def routers(measured: Measured) -> str:
    """Router reports, as means over the layers."""
    rows = []
    for row in measured.rows:
        report = row.result.router
        scores = report.mean.model_dump() if report else {}
        cells = ("-" if scores[key] is None else f"{scores[key]:.3f}" for key in SCORES)
        loads = [layer.coefficient_of_variation for layer in row.result.expert_usage]
        rows.append((_label(row), *cells, f"{mean(loads):.2f}" if loads else "-"))
    headers = ("method", *SCORES.values(), "load, coefficient of variation")
    return f"{_circumstances(measured.rows[0])}\n\n{markdown_table(headers, rows)}"


def _label(row: Row) -> str:
    seed = row.cell.config.seed
    return f"{row.name}, seed {seed}" if seed else row.name


def _circumstances(row: Row) -> str:
    calibrate, evaluate = row.cell.config.calibrate, row.cell.config.eval
    return (
        f"Calibration: {calibrate.tokens} tokens of {', '.join(calibrate.data)} in windows of "
        f"{calibrate.sequence_length}. Evaluation: the first {evaluate.windows} windows of "
        f"{evaluate.sequence_length} tokens of {', '.join(evaluate.data)} "
        f"({row.result.tokens} predicted tokens). Dense perplexity "
        f"{format_number(row.compared.dense_perplexity)}."
    )


def _values(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high


def _against(difference: Interval | None) -> str:
    if difference is None:
        return "-"
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*_values(difference))


def _over(weave: float | None, row: Row) -> str:
    """weave's KL at the FLOPs that a row measured, between its own settings, over the row's."""
    return "-" if weave is None else f"{weave / row.result.kl:.2f}"


def _router_agreement(row: Row) -> str:
    """Mean over layers of the share of chosen experts that the oracle chooses too."""
    layers = row.summary(RouterSummary, "build-router").layers
    if not layers:
        return "-"
    return (
        f"{mean(layer.oracle_agreement for layer in layers):.1%} "
        f"({mean(layer.chance_agreement for layer in layers):.1%})"
    )
