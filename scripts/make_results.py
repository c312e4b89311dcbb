"""Make docs/results.md: every method at several sparsities on a real model, from measured runs.

Each row is a run directory below --runs, so that an interrupted script goes on where it
stopped and every number can be looked up in a results.json. Run it through ``make results``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from results_rows import RUNS, Row, Setting, settings
from results_tables import describe

from weaver.artifacts.manifest import MANIFEST
from weaver.cli.session import make_context, quiet_libraries
from weaver.config.loading import RunConfig
from weaver.config.sections import ModelConfig
from weaver.stages.pipeline import run_pipeline, stage_calls

STAGES = ("partition", "build-router", "assemble", "eval")


def write_texts(base: Path, data_dir: Path) -> None:
    """WikiText-2's splits as one document each, so that windows are cut from the text as it is."""
    base.mkdir(parents=True, exist_ok=True)
    for split in ("valid", "test"):
        text = (data_dir / f"wikitext2/tok.{split}.txt").read_text(encoding="utf-8")
        (base / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")


def is_finished(setting: Setting, row: Row) -> bool:
    """Whether a row has been evaluated."""
    return (setting.run_dir(row) / "eval" / MANIFEST).exists()


def run_row(setting: Setting, row: Row, model: ModelConfig, data_dir: Path) -> dict[str, Any]:
    """Convert and evaluate one row; finished stages are skipped.

    Returns:
        Its results.json, with the row and with build-router's fidelity per layer.
    """
    print(setting.group, row.folder, flush=True)
    config = RunConfig(
        model=model,
        calibrate=setting.calibrate,
        partition=row.partition,
        router=row.router,
        eval=setting.evaluate,
    )
    shared = setting.calibration_dir(row)
    context = make_context(shared, seed=row.seed, data_dir=data_dir)
    # Reading a finished calibration needs no lock: rows may run side by side.
    if not (shared / "calibrate" / MANIFEST).exists():
        run_pipeline(context, {"calibrate": stage_calls(config)["calibrate"]}, lambda *_: None)
    run_dir = setting.run_dir(row)
    calls = stage_calls(config, shared / "calibrate")
    context = make_context(run_dir, seed=row.seed, data_dir=data_dir)
    manifests: dict[str, Any] = {}
    run_pipeline(context, {stage: calls[stage] for stage in STAGES}, manifests.__setitem__)
    result: dict[str, Any] = json.loads((run_dir / "eval" / "results.json").read_text())
    result["row"] = row
    result["fidelity"] = manifests["build-router"].summary["layers"]
    print(f"  KL {result['kl']:.4f} perplexity {result['moe']['perplexity']:.2f}", flush=True)
    return result


def main() -> None:
    """Run the settings and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2-135m", help="Any local checkpoint.")
    parser.add_argument("--dtype", default="auto", help="Of the conversion: auto, float32, ...")
    parser.add_argument("--runs", type=Path, default=RUNS, help="One folder per model.")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--settings", nargs="+", help="Only these tables, on the terminal.")
    parser.add_argument("--finished", action="store_true", help="Run nothing; finished rows only.")
    parser.add_argument("--rows", nargs="+", help="Only rows whose folder is named here.")
    arguments = parser.parse_args()
    quiet_libraries()
    model = ModelConfig(path=arguments.model, dtype=arguments.dtype)
    write_texts(arguments.runs, arguments.data_dir)
    parts = [HEADER.format(model=Path(arguments.model).name)]
    for setting in settings(arguments.runs):
        if arguments.settings and setting.name not in arguments.settings:
            continue
        rows = [row for row in setting.rows if not arguments.rows or row.folder in arguments.rows]
        if arguments.finished:
            rows = [row for row in rows if is_finished(setting, row)]
        results = [run_row(setting, row, model, arguments.data_dir) for row in rows]
        if results:
            parts += [describe(setting, results), ""]
    if arguments.settings or arguments.rows:
        print("\n".join(parts[1:]))
    else:
        arguments.out.write_text("\n".join(parts))


HEADER = """# Results

Made by `scripts/make_results.py` (`make results DATA_DIR=...`) on {model}: converted in the
checkpoint's dtype, measured as the table says. Every method gets the same calibration tokens. FFN
sparsity is what was asked for; "FFN FLOPs, measured" is what the evaluated tokens really cost,
router, constants and the realised number of experts counted, over the dense FFN's. KL is
KL(dense || converted) in nats per token, with a bootstrap interval over windows; differences are
paired by window; "equal FLOPs" is weave's KL between its two nearest settings at the FLOPs that the
row measured, where they lie around it. Nothing here was trained. Router agreement: share of a
token's experts that the oracle chooses too, averaged over layers, on calibration tokens. A table
holds the rows that were run. `results_published.md` has the published methods in more detail.

Rows: "weave" is the default (16 experts, threshold selection, uniform budgets); "one slice less"
asks for 5 of 16 slices to be skipped instead of 4; "top-k" runs exactly K experts for every token;
"stock" is top-k without constants, the form that a stock architecture can hold; "flap, refit" is
FLAP with weave's re-solved down projection and "fisher" has budgets by predicted KL. Elements and
variants change one thing of "weave" at a time. All methods but those called one-shot are
sequential.
"""

if __name__ == "__main__":
    main()
