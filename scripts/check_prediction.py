"""Make docs/prediction.md: is the predicted KL of a layer the measured one?

Converts single layers of a dense model with weave, everything else left dense, and compares the KL
that Fisher gradients predict with the one that is measured on the same tokens. Then the same for
whole conversions, from finished rows of ``make_results.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from results_rows import RUNS, SPARSITIES, weave
from scipy.stats import spearmanr

from weaver.algorithms.glu import glu_forward
from weaver.algorithms.sensitivity import predicted_kl
from weaver.cli.session import make_context, quiet_libraries
from weaver.config.sections import RouterConfig
from weaver.conversion.partition_settings import resolve_settings
from weaver.conversion.splitter import LayerSplitter
from weaver.conversion.trials import Trial, convert_alone
from weaver.evaluation.perplexity import compare
from weaver.models.loading import load_model
from weaver.report.tables import format_percent, markdown_table
from weaver.rundir.inputs import open_calibration


@dataclass(frozen=True)
class Checked:
    """KL of one converted layer, nats per token: predicted and measured."""

    layer: int
    predicted: float
    measured: float


def check_layers(splitter: LayerSplitter, trial: Trial, every: int) -> list[Checked]:
    """Convert every n-th layer alone and measure what that does to the model's output."""
    checkpoint = splitter.checkpoint
    dense, converted = (load_model(checkpoint.folder, torch.float32) for _ in range(2))
    rows = []
    for layer in range(0, checkpoint.num_layers, every):
        profile = splitter.calibration.profile(layer)
        ffn = convert_alone(splitter, trial, layer, profile, splitter.uniform_neurons)
        x_TD = profile.ffn_inputs_ND[trial.held_out_n].float()
        error_TD = ffn(x_TD) - glu_forward(x_TD, checkpoint.ffn(layer, torch.float32))
        predicted = predicted_kl(error_TD, trial.gradients_L[layer])
        block = converted.get_submodule(f"{checkpoint.family.layers}.{layer}")
        original = getattr(block, checkpoint.family.ffn)
        setattr(block, checkpoint.family.ffn, ffn)
        measured = compare(dense, converted, trial.windows_WT).kl
        setattr(block, checkpoint.family.ffn, original)
        rows.append(Checked(layer, predicted, measured))
        print(rows[-1], flush=True)
    return rows


def layer_table(by_sparsity: dict[float, list[Checked]]) -> str:
    """Predicted and measured KL per layer, then sums and rank correlations."""
    headers = ["layer"]
    for sparsity in by_sparsity:
        headers += [f"predicted at {sparsity:.0%}", f"measured at {sparsity:.0%}"]
    rows: list[Sequence[object]] = []
    for together in zip(*by_sparsity.values(), strict=True):
        cells = [f"{kl:.5f}" for each in together for kl in (each.predicted, each.measured)]
        rows.append((together[0].layer, *cells))
    sums, ranks = ["sum"], ["Spearman correlation"]
    for checked in by_sparsity.values():
        predicted, measured = ([getattr(c, k) for c in checked] for k in ("predicted", "measured"))
        sums += [f"{sum(predicted):.4f}", f"{sum(measured):.4f}"]
        ranks += [f"{spearmanr(predicted, measured).statistic:.3f}", ""]
    return markdown_table(headers, [*rows, sums, ranks])


def model_table(group: Path) -> str:
    """Predicted and realised KL of whole conversions with Fisher budgets and with equal layers."""
    rows = []
    for sparsity in SPARSITIES:
        fisher = group / weave("weave, fisher", sparsity).folder
        uniform = group / weave("weave", sparsity).folder
        if not (fisher / "eval" / "results.json").exists():
            continue
        budget = json.loads((fisher / "partition" / "budget.json").read_text())
        for name, run, key in (
            ("uniform", uniform, "uniform_kl"),
            ("fisher", fisher, "predicted_kl"),
        ):
            kl = json.loads((run / "eval" / "results.json").read_text())["kl"]
            rows.append((name, format_percent(sparsity), f"{budget[key]:.3f}", f"{kl:.3f}"))
    return markdown_table(("budgets", "FFN sparsity", "predicted KL", "realised KL"), rows)


def main() -> None:
    """Measure and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, default=RUNS / "calibrate-matched-0")
    parser.add_argument("--group", type=Path, default=RUNS / "matched", help="Finished rows.")
    parser.add_argument("--every", type=int, default=2, help="Check every n-th layer.")
    parser.add_argument("--out", type=Path, default=Path("docs/prediction.md"))
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_grad_enabled(False)
    context = make_context(Path("runs"))
    calibration = open_calibration(arguments.calibration / "calibrate")
    trial = Trial.prepare(context, calibration)
    by_sparsity = {}
    for sparsity in SPARSITIES:
        config = weave("weave", sparsity).partition
        splitter = LayerSplitter(calibration, resolve_settings(config, RouterConfig()), 0)
        by_sparsity[sparsity] = check_layers(splitter, trial, arguments.every)
    text = HEADER.format(
        model=calibration.checkpoint.folder.name,
        tokens=trial.held_out_n.numel(),
        fit=trial.fit_n.numel(),
    )
    arguments.out.write_text(
        f"{text}\n{layer_table(by_sparsity)}\n{MIDDLE}\n{model_table(arguments.group)}\n"
    )


HEADER = """# Predicted and measured KL

Made by `scripts/check_prediction.py` on {model}. One layer is converted by weave and the others
stay dense; both columns are of the same {tokens} calibration tokens, which the layer was not fitted
on ({fit} others were). Predicted: half the mean squared projection of the layer's output error on
the Fisher gradient there (`weaver/algorithms/sensitivity.py`), which neglects what tokens do to
each other and all terms beyond the second order. Measured: KL(dense || converted), nats per token,
float32.
"""

MIDDLE = """
## Whole conversions

The sum over all layers, predicted before the conversion on calibration text with the layers taken
one by one on the dense model's inputs and fitted on few tokens, against the KL of the finished
conversion on the text of [results.md](results.md) (first table).
"""

if __name__ == "__main__":
    main()
