"""Make docs/results.md: every method at several sparsities on a real model, from measured runs.

Each row is a run directory below runs/results, so that an interrupted script goes on where it
stopped and every number can be looked up in a results.json. Run it through ``make results``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weaver.cli.session import make_context, quiet_libraries
from weaver.config import (
    CalibrateConfig,
    EvalConfig,
    ModelConfig,
    PartitionConfig,
    RunConfig,
)
from weaver.evaluation.bootstrap import bootstrap_interval
from weaver.methods.registry import METHODS
from weaver.report.tables import format_number, format_percent, markdown_table
from weaver.stages.lock import locked
from weaver.stages.pipeline import run_pipeline, stage_calls

DOMAINS = "domains"
BASE = Path("runs/results")
STAGES = ("partition", "build-router", "assemble", "eval")


@dataclass(frozen=True)
class Setting:
    """One table: which text calibrates, which text is measured, which rows there are."""

    name: str
    title: str
    calibrate: CalibrateConfig
    evaluate: EvalConfig
    rows: tuple[PartitionConfig, ...]


def settings() -> list[Setting]:
    """The tables of docs/results.md."""
    sparsities = (0.125, 0.25, 0.5)
    return [
        Setting(
            "main",
            "Multi-task and multi-domain calibration, raw WikiText-2 test",
            CalibrateConfig(
                data=("multitask_calib/open.jsonl", DOMAINS), tokens=16384, input_sample_mb=2
            ),
            EvalConfig(data=("wikitext2/wiki.test.rebuilt.raw",), sequence_length=2048, windows=14),
            tuple(_row(name, s) for s in sparsities for name in METHODS),
        ),
        Setting(
            "matched",
            "Calibration on tokenised WikiText-2 valid, measured on its test split",
            CalibrateConfig(data=("wikitext2/tok.valid.txt",), tokens=16384, input_sample_mb=2),
            EvalConfig(data=("wikitext2/tok.test.txt",), sequence_length=512, windows=12),
            tuple(_row(name, 0.25) for name in ("expertweaver", "cmoe", "flap")),
        ),
    ]


def _row(method: str, sparsity: float) -> PartitionConfig:
    # These two look at no activation, so profiling behind converted layers changes nothing.
    blind = method in ("random", "weight-kmeans")
    return PartitionConfig(method=method, sparsity=sparsity, sequential=not blind)


def run_setting(setting: Setting, model: str, data_dir: Path) -> list[dict[str, Any]]:
    """Run every row of a setting; finished ones are skipped."""
    base = BASE / setting.name
    config = RunConfig(
        model=ModelConfig(path=model), calibrate=setting.calibrate, eval=setting.evaluate
    )
    context = make_context(base, seed=0, force=False, dry_run=False, data_dir=data_dir)
    with locked(base):
        stage_calls(config)["calibrate"](context)
    return [run_row(setting, config, row, data_dir) for row in setting.rows]


def run_row(
    setting: Setting, config: RunConfig, row: PartitionConfig, data_dir: Path
) -> dict[str, Any]:
    """Convert and evaluate one row; its results.json."""
    mode = "sequential" if row.sequential else "one-shot"
    run_dir = BASE / setting.name / f"{row.method}-{row.sparsity:g}-{mode}"
    print(run_dir, flush=True)
    calls = stage_calls(
        config.model_copy(update={"partition": row}), BASE / setting.name / "calibrate"
    )
    context = make_context(run_dir, seed=0, force=False, dry_run=False, data_dir=data_dir)
    with locked(run_dir):
        chosen = {stage: calls[stage] for stage in STAGES}
        run_pipeline(context, chosen, lambda _stage, _manifest: None)
    result: dict[str, Any] = json.loads((run_dir / "eval" / "results.json").read_text())
    result["row"] = row
    result["router"] = json.loads((run_dir / "router" / "manifest.json").read_text())["summary"]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One row per run."""
    headers = (
        "method",
        "calibration",
        "FFN sparsity",
        "KL (95% interval)",
        "perplexity",
        "top-1 agreement",
        "FFN FLOPs",
        "active parameters",
        "router agreement (by chance)",
    )
    rows = []
    for result in results:
        mean, low, high = bootstrap_interval(
            result["windows"]["kl"], torch.Generator().manual_seed(0)
        )
        flops = result["moe"]["ffn_flops_per_token"] / result["dense"]["ffn_flops_per_token"]
        row: PartitionConfig = result["row"]
        rows.append(
            (
                row.method,
                "sequential" if row.sequential else "one-shot",
                format_percent(result["ffn_sparsity"]),
                f"{mean:.3f} ({low:.3f}-{high:.3f})",
                format_number(result["moe"]["perplexity"]),
                format_percent(result["top1_agreement"]),
                f"{flops:.3f}",
                f"{result['active_parameters'] / 1e6:.1f}M",
                router_agreement(result["router"]["layers"]),
            )
        )
    return markdown_table(headers, rows)


def router_agreement(layers: list[dict[str, float]]) -> str:
    """Mean over layers of the share of chosen experts that the oracle chooses too."""
    if not layers:
        return "-"
    means = (
        sum(layer[key] for layer in layers) / len(layers)
        for key in ("oracle_agreement", "chance_agreement")
    )
    return "{:.1%} ({:.1%})".format(*means)


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
            table(results),
        ]
    )


def main() -> None:
    """Run all settings and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    quiet_libraries()
    parts = [HEADER.format(model=Path(arguments.model).name)]
    for setting in settings():
        parts.append(describe(setting, run_setting(setting, arguments.model, arguments.data_dir)))
        arguments.out.write_text("\n".join(parts) + "\n")


HEADER = """# Results

Made by `scripts/make_results.py` (`make results DATA_DIR=...`) on {model}, computed in the
checkpoint's dtype (bfloat16). Every method gets the same calibration tokens and is compared at
equal active FFN neurons (scope: ffn); the router's cost is in the FLOPs column (share of the dense
FFN's). KL is KL(dense || converted) in nats per token, with a bootstrap interval over windows.
Nothing here was trained. Router agreement: share of a token's K experts that are also among the K
with the largest output norms, averaged over layers, on calibration tokens.

"sequential": every layer is profiled on the output of the converted layers before it. "one-shot":
all layers are profiled on the dense model.
"""

if __name__ == "__main__":
    main()
