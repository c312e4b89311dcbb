"""``inspect --layer``: what the stages of a run have measured of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weaver.artifacts.results import LayerUsage
from weaver.artifacts.summaries import FfnRow, RouterSummary, read_summary
from weaver.conversion.layer_budgets import predicted_layer_kl
from weaver.errors import WeaverError
from weaver.report.layer_view import LayerFacts
from weaver.rundir.inputs import open_partition
from weaver.rundir.inspection import inspect_run
from weaver.rundir.measurements import read_eval
from weaver.stages.report import RATE_EDGES, activation_rates, rate_counts


@dataclass(frozen=True)
class LayerReport:
    """A layer among the others.

    Args:
        split: a sentence on how it was split.
        facts: measures of every layer.
        spreads: lists of values inside the layer, by name.
    """

    split: str
    facts: list[LayerFacts]
    spreads: dict[str, list[float]]


def inspect_layer(run_dir: Path, layer: int) -> LayerReport:
    """Collect what is known of a layer.

    Raises:
        WeaverError: no finished partition, no such layer, or a model that had experts before.
    """
    states = inspect_run(run_dir, verify=False)
    summaries = {each.stage: each.manifest.summary for each in states if each.manifest}
    partition = open_partition(run_dir / "partition")
    splits = {row.layer: row for row in partition.summary.layers}
    if any(row.part for row in partition.summary.layers):
        raise WeaverError(
            "inspect --layer of a model that had experts before",
            why="each of its layers has several FFNs",
            fix=f"weaver inspect {run_dir} shows them layer by layer",
        )
    if layer not in splits:
        raise WeaverError(
            f"{run_dir}: no layer {layer}",
            why=f"the model has layers 0 to {max(splits)}",
            fix=f"--layer {max(splits)}",
        )
    split = splits[layer]
    chosen = f"{split.selection} of {split.experts} experts of {split.expert_width} neurons"
    facts = [
        _facts("shared neurons", splits.values(), "shared_share", percent=True),
        LayerFacts("active neurons", {i: 1 - s.sparsity for i, s in splits.items()}, percent=True),
    ]
    spreads: dict[str, list[float]] = {}
    if "build-router" in summaries:
        routed = read_summary(RouterSummary, summaries["build-router"]).layers
        facts += [
            _facts("agreement with the oracle", routed, "oracle_agreement", percent=True),
            _facts("by chance", routed, "chance_agreement", percent=True),
            _facts("captured contribution", routed, "captured_contribution", percent=True),
            LayerFacts("output error, relative", {r.layer: r.errors[-1].error for r in routed}),
        ]
        spreads["output error by position"] = [
            part.error for row in routed if row.layer == layer for part in row.errors
        ]
    predicted = predicted_layer_kl(run_dir / "partition") or ()
    facts.append(LayerFacts("predicted KL, nats", dict(enumerate(predicted))))
    if "eval" in summaries:
        result = read_eval(run_dir)
        facts += [
            _facts("experts per token, eval", result.expert_usage, "experts_per_token"),
            _facts("load, std / mean, eval", result.expert_usage, "coefficient_of_variation"),
        ]
        spreads["token share of each expert, eval"] = [
            share for row in result.expert_usage if row.layer == layer for share in row.token_share
        ]
    rates_F = activation_rates(partition.calibration, layer)
    spreads[f"neurons by activation rate, 2^-12 to 1, {len(RATE_EDGES) - 1} bins"] = rate_counts(
        rates_F
    ).tolist()
    return LayerReport(
        f"{split.shared_neurons} shared neurons, "
        + (f"{chosen}, {split.top_k} per token" if split.experts else "static"),
        [each for each in facts if each.values],
        spreads,
    )


def _facts(
    name: str, rows: Iterable[FfnRow | LayerUsage], field: str, *, percent: bool = False
) -> LayerFacts:
    return LayerFacts(name, {row.layer: float(getattr(row, field)) for row in rows}, percent)
