"""Predicted against measured KL: docs/prediction.md.

Single layers of a dense model are converted with weave, everything else left dense, and the KL that
Fisher gradients predict is compared with the one that is measured on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr

from tables.kept import kept
from tables.rows import Measured
from weaver.algorithms.glu import glu_forward
from weaver.algorithms.sensitivity import predicted_kl
from weaver.artifacts.summaries import PartitionSummary
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.conversion.partition_settings import resolve_settings
from weaver.conversion.splitter import LayerSplitter
from weaver.conversion.trials import Trial, convert_alone
from weaver.evaluation.perplexity import compare
from weaver.models.loading import load_model
from weaver.report.tables import format_percent, markdown_table
from weaver.rundir.inputs import open_calibration
from weaver.rundir.stage_run import StageContext

SPARSITIES = (0.25, 0.5)
# Every n-th layer is checked.
EVERY = 6


@dataclass(frozen=True)
class Checked:
    """KL of one converted layer, nats per token: predicted and measured."""

    layer: int
    predicted: float
    measured: float


def layers(measured: Measured) -> str:
    """Predicted and measured KL per layer, then sums and rank correlations."""
    row = measured.rows[0]
    calibration = row.run_dir.parent / row.cell.calibration / "calibrate"
    path = calibration.parent / "prediction.json"
    found = kept(path, calibration, lambda: _check(row.run_dir.parent, calibration))
    checked = [[Checked(**each) for each in layers] for layers in found["layers"]]
    headers = ["layer"]
    for sparsity in SPARSITIES:
        headers += [f"predicted at {sparsity:.0%}", f"measured at {sparsity:.0%}"]
    rows: list[Sequence[object]] = [
        (together[0].layer, *(f"{kl:.5f}" for c in together for kl in (c.predicted, c.measured)))
        for together in zip(*checked, strict=True)
    ]
    sums, ranks = ["sum"], ["Spearman correlation"]
    for column in checked:
        predicted, realised = ([getattr(c, k) for c in column] for k in ("predicted", "measured"))
        sums += [f"{sum(predicted):.4f}", f"{sum(realised):.4f}"]
        ranks += [f"{spearmanr(predicted, realised).statistic:.3f}", ""]
    tokens = f"{found['tokens']} calibration tokens; layers were fitted on {found['fit']} others."
    return f"{tokens}\n\n{markdown_table(headers, [*rows, sums, ranks])}"


def conversions(measured: Measured) -> str:
    """Predicted and realised KL of whole conversions with Fisher budgets and with equal layers."""
    rows = {row.name: row for row in measured.rows}
    summary = rows["weave, fisher"].summary(PartitionSummary, "partition")
    cells = []
    for budgets, name, predicted in (
        ("uniform", "weave", summary.uniform_kl),
        ("fisher", "weave, fisher", summary.predicted_kl),
    ):
        sparsity, kl = format_percent(rows[name].sparsity), f"{rows[name].result.kl:.3f}"
        cells.append((budgets, sparsity, f"{predicted:.3f}", kl))
    return markdown_table(("budgets", "FFN sparsity", "predicted KL", "realised KL"), cells)


@torch.no_grad()
def _check(run_dir: Path, folder: Path) -> dict[str, object]:
    calibration = open_calibration(folder)
    trial = Trial.prepare(StageContext(run_dir), calibration)
    found = []
    for sparsity in SPARSITIES:
        config = PartitionConfig(method="weave", sparsity=sparsity)
        splitter = LayerSplitter(calibration, resolve_settings(config, RouterConfig()), 0)
        found.append([asdict(each) for each in _check_layers(splitter, trial)])
    tokens, fit = trial.held_out_n.numel(), trial.fit_n.numel()
    return {"tokens": tokens, "fit": fit, "layers": found}


def _check_layers(splitter: LayerSplitter, trial: Trial) -> list[Checked]:
    """Convert every n-th layer alone and measure what that does to the model's output."""
    checkpoint = splitter.checkpoint
    dense, converted = (load_model(checkpoint.folder, torch.float32) for _ in range(2))
    rows = []
    for layer in range(0, checkpoint.num_layers, EVERY):
        profile = splitter.calibration.profile(layer)
        ffn = convert_alone(splitter, trial, layer, profile, splitter.uniform_neurons)
        x_TD = profile.ffn_inputs_ND[trial.held_out_n].float()
        error_TD = ffn(x_TD) - glu_forward(x_TD, checkpoint.ffn(layer, torch.float32))
        predicted = predicted_kl(error_TD, trial.gradients_L[layer])
        block = converted.get_submodule(f"{checkpoint.family.layers}.{layer}")
        original = getattr(block, checkpoint.family.ffn)
        setattr(block, checkpoint.family.ffn, ffn)
        rows.append(Checked(layer, predicted, compare(dense, converted, trial.windows_WT).kl))
        setattr(block, checkpoint.family.ffn, original)
    return rows
