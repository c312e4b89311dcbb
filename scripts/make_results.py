"""Make docs/results.md: every method at several sparsities on a real model, from measured runs.

Each row is a run directory below runs/results, so that an interrupted script goes on where it
stopped and every number can be looked up in a results.json. Run it through ``make results``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from weaver.artifacts.manifest import MANIFEST
from weaver.cli.session import make_context, quiet_libraries
from weaver.config import (
    CalibrateConfig,
    EvalConfig,
    ModelConfig,
    PartitionConfig,
    RouterConfig,
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
TASKS = (
    "mc/arc_easy.jsonl",
    "mc/piqa.jsonl",
    "hellaswag/hellaswag_val_full.txt.bz2",
    "mc/lambada_openai.jsonl",
)
TOP_K = {"selection": "top-k"}


@dataclass(frozen=True)
class Row:
    """One run: how it differs from the others.

    Args:
        name: first column, and part of the run directory's name.
        partition: how FFNs are split.
        router: router and compensation.
        seed: of calibration and partition.
    """

    name: str
    partition: PartitionConfig
    router: RouterConfig = field(default_factory=RouterConfig)
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of the run directory."""
        return f"{self.name.replace(' ', '-').replace(',', '')}-{self.partition.sparsity:g}"


@dataclass(frozen=True)
class Setting:
    """One table: which text calibrates, which text is measured, which rows there are."""

    name: str
    title: str
    calibrate: CalibrateConfig
    evaluate: EvalConfig
    rows: tuple[Row, ...]


def settings(base: Path) -> list[Setting]:
    """The tables of docs/results.md."""
    main = CalibrateConfig(data=("multitask_calib/open.jsonl", DOMAINS), tokens=16384)
    raw = EvalConfig(data=("wikitext2/wiki.test.rebuilt.raw",), sequence_length=2048, windows=14)
    valid, test = (str(base / f"{split}.jsonl") for split in ("valid", "test"))
    matched = CalibrateConfig(data=(valid,), tokens=16384, sequence_length=512)
    plain = EvalConfig(data=(test,), sequence_length=512, windows=12, dtype="float32")
    return [
        Setting(
            "matched",
            "Calibration on WikiText-2 valid, measured on its test split",
            matched,
            plain,
            tuple(row for s in (0.25, 0.5) for row in _compared(s)),
        ),
        Setting("elements", "Elements of weave", matched, plain, tuple(_elements(0.5))),
        Setting(
            "seeds",
            "Other calibration samples",
            main,
            plain,
            tuple(
                Row(f"{name} seed {seed}", PartitionConfig(method=name, sparsity=0.5), seed=seed)
                for seed in (0, 1, 2)
                for name in ("weave", "flap")
            ),
        ),
        Setting(
            "main",
            "Multi-task and multi-domain calibration, raw WikiText-2 test",
            main,
            raw,
            tuple(_published(name, s) for s in (0.25, 0.5) for name in METHODS),
        ),
        Setting(
            "tasks",
            "Zero-shot tasks",
            main,
            raw.model_copy(update={"windows": 1, "tasks": TASKS, "task_limit": 500}),
            tuple(_published(name, 0.5) for name in ("weave", "flap", "cmoe", "expertweaver")),
        ),
    ]


def _published(method: str, sparsity: float) -> Row:
    # These two look at no activation, so profiling behind converted layers changes nothing.
    blind = method in ("random", "weight-kmeans")
    partition = PartitionConfig(method=method, sparsity=sparsity, sequential=not blind)
    return Row(method, partition)


def _compared(sparsity: float) -> list[Row]:
    """weave and its variants beside the published methods and the strongest static baseline."""
    weave = PartitionConfig(method="weave", sparsity=sparsity)
    static = PartitionConfig(method="flap", sparsity=sparsity, sequential=True)
    refit = RouterConfig(refit=True, constants=True)
    return [
        Row("weave", weave),
        Row("weave, 8 experts", weave.model_copy(update={"num_experts": 8})),
        Row("weave, top-k", weave.model_copy(update={"options": TOP_K})),
        Row(
            "weave, stock",
            weave.model_copy(update={"options": TOP_K}),
            RouterConfig(constants=False),
        ),
        Row("flap", static),
        Row("flap, refit", static, refit),
        Row("flap, refit, fisher", static.model_copy(update={"allocation": "fisher"}), refit),
        _published("cmoe", sparsity),
        _published("expertweaver", sparsity),
    ]


def _elements(sparsity: float) -> list[Row]:
    """weave with one element changed at a time."""

    def changed(**values: Any) -> PartitionConfig:
        return PartitionConfig(method="weave", sparsity=sparsity, **values)

    return [
        Row("weave", changed()),
        Row("fisher budgets", changed(allocation="fisher")),
        Row("no refit", changed(), RouterConfig(refit=False)),
        Row("no constants", changed(), RouterConfig(constants=False)),
        Row("one-shot", changed(sequential=False)),
        Row("no alternation", changed(options={"alternations": 0})),
        Row("half shared", changed(options={"shared_share": 0.5})),
        Row("64 experts", changed(num_experts=64)),
        Row("mean-gate router, top-k", changed(options=TOP_K), RouterConfig(kind="mean-gate")),
    ]


def write_texts(base: Path, data_dir: Path) -> None:
    """WikiText-2's splits as one document each, so that windows are cut from the text as it is."""
    base.mkdir(parents=True, exist_ok=True)
    for split in ("valid", "test"):
        text = (data_dir / f"wikitext2/tok.{split}.txt").read_text(encoding="utf-8")
        (base / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")


def is_finished(setting: Setting, row: Row) -> bool:
    """Whether a row has been evaluated."""
    return (BASE / setting.name / row.folder / "eval" / MANIFEST).exists()


def run_row(setting: Setting, row: Row, model: str, data_dir: Path) -> dict[str, Any]:
    """Convert and evaluate one row; its results.json. Finished stages are skipped."""
    print(setting.name, row.folder, flush=True)
    config = RunConfig(
        model=ModelConfig(path=model),
        calibrate=setting.calibrate,
        partition=row.partition,
        router=row.router,
        eval=setting.evaluate,
    )
    shared = BASE / f"calibrate-{'matched' if DOMAINS not in setting.calibrate.data else 'main'}"
    shared = shared.with_name(f"{shared.name}-{row.seed}")
    context = make_context(shared, seed=row.seed, force=False, dry_run=False, data_dir=data_dir)
    with locked(shared):
        stage_calls(config)["calibrate"](context)
    run_dir = BASE / setting.name / row.folder
    calls = stage_calls(config, shared / "calibrate")
    context = make_context(run_dir, seed=row.seed, force=False, dry_run=False, data_dir=data_dir)
    manifests: dict[str, Any] = {}
    with locked(run_dir):
        chosen = {stage: calls[stage] for stage in STAGES}
        run_pipeline(context, chosen, lambda stage, manifest: manifests.update({stage: manifest}))
    result: dict[str, Any] = json.loads((run_dir / "eval" / "results.json").read_text())
    result["row"] = row
    result["router"] = manifests["build-router"].summary
    result["partition"] = manifests["partition"].summary
    print(f"  KL {result['kl']:.4f} perplexity {result['moe']['perplexity']:.2f}", flush=True)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One row per run."""
    headers = (
        "method",
        "FFN sparsity",
        "KL (95% interval)",
        "KL against the first row (95% interval)",
        "perplexity",
        "top-1 agreement",
        "FFN FLOPs, measured",
        "router agreement (by chance)",
    )
    rows = []
    first: dict[str, Any] = {}
    for result in results:
        sparsity = result["row"].partition.sparsity
        generator = torch.Generator().manual_seed(0)
        mean, low, high = bootstrap_interval(result["windows"]["kl"], generator)
        if first.get("sparsity") != sparsity:
            first = {"sparsity": sparsity, "kl": result["windows"]["kl"]}
        flops = result["measured_ffn_flops_per_token"] / result["dense"]["ffn_flops_per_token"]
        rows.append(
            (
                result["row"].name,
                format_percent(sparsity),
                f"{mean:.3f} ({low:.3f}-{high:.3f})",
                difference(result["windows"]["kl"], first["kl"]),
                format_number(result["moe"]["perplexity"]),
                format_percent(result["top1_agreement"]),
                f"{flops:.3f}",
                router_agreement(result["router"]["layers"]),
            )
        )
    return markdown_table(headers, rows)


def difference(kl: list[float], reference: list[float]) -> str:
    """Mean difference of two rows' KL with a paired bootstrap interval over windows."""
    if kl == reference:
        return "-"
    apart = [a - b for a, b in zip(kl, reference, strict=True)]
    mean, low, high = bootstrap_interval(apart, torch.Generator().manual_seed(0))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


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
    """Run the settings and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2-135m", help="Any local checkpoint.")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--settings", nargs="+", help="Only these tables, on the terminal.")
    parser.add_argument("--finished", action="store_true", help="Run nothing; finished rows only.")
    parser.add_argument("--rows", nargs="+", help="Only rows whose folder is named here.")
    arguments = parser.parse_args()
    quiet_libraries()
    write_texts(BASE, arguments.data_dir)
    parts = [HEADER.format(model=Path(arguments.model).name)]
    for setting in settings(BASE):
        if arguments.settings and setting.name not in arguments.settings:
            continue
        rows = [row for row in setting.rows if not arguments.rows or row.folder in arguments.rows]
        if arguments.finished:
            rows = [row for row in rows if is_finished(setting, row)]
        results = [run_row(setting, row, arguments.model, arguments.data_dir) for row in rows]
        if results:
            parts += [describe(setting, results), ""]
    if arguments.settings or arguments.rows:
        print("\n".join(parts[1:]))
    else:
        arguments.out.write_text("\n".join(parts))


HEADER = """# Results

Made by `scripts/make_results.py` (`make results DATA_DIR=...`) on {model}: converted in the
checkpoint's dtype (bfloat16), measured as the table says. Every method gets the same calibration
tokens. FFN sparsity is what was asked for; "FFN FLOPs, measured" is what the evaluated tokens
really cost, router, constants and the realised number of experts counted, over the dense FFN's.
KL is KL(dense || converted) in nats per token, with a bootstrap interval over windows; differences
are paired by window. Nothing here was trained. Router agreement: share of a token's experts that
the oracle chooses too, averaged over layers, on calibration tokens. A table holds the rows that
were run. `results_published.md` has the published methods in more detail.

Rows: "weave" is the default (16 experts, threshold selection, uniform budgets); "top-k" runs
exactly K experts for every token; "stock" is top-k without constants, the form that a stock
architecture can hold; "flap, refit" is FLAP with weave's re-solved down projection.
"""

if __name__ == "__main__":
    main()
