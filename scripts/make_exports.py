"""Make docs/export_checks.md: every export against the model it was made from.

A real model in every target; each row is one ``weaver verify``, a process that cannot import
weaver (or llama.cpp). What was measured below --runs is not measured again. The families are the
matter of tests: tests/export/test_stock_targets.py, test_gguf.py, test_remote_code.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversions import convert, weaver

from weaver.report.tables import markdown_table

GLM, GRANITE, GGUF, OWN = "glm4-moe", "granite-moe-shared", "gguf", "weaver"
# Conversions of the real model: overrides of the configuration file.
CONVERSIONS: dict[str, Sequence[str]] = {
    "expertweaver, 8 slices": ("partition.method=expertweaver", "partition.num_experts=8"),
    "expertweaver, 64 slices": ("partition.method=expertweaver", "partition.num_experts=64"),
    "weight-kmeans": ("partition.method=weight-kmeans", "partition.num_experts=8"),
    "weave, stock form": (
        *("partition.method=weave", "partition.num_experts=64"),
        *("partition.options.selection=top-k", "router.constants=false"),
    ),
    "weave": ("partition.method=weave", "partition.num_experts=16"),
    "cmoe": ("partition.method=cmoe", "partition.num_experts=8"),
}
# Exports: conversion, target, options.
EXPORTS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("expertweaver, 8 slices", GLM, ()),
    ("weight-kmeans", GRANITE, ("--dtype", "float32")),
    ("expertweaver, 8 slices", GGUF, ("--quantisation", "f32")),
    ("expertweaver, 8 slices", GGUF, ("--quantisation", "f16")),
    ("expertweaver, 8 slices", GGUF, ("--quantisation", "bf16")),
    ("expertweaver, 8 slices", GGUF, ("--quantisation", "q8_0")),
    ("cmoe", GLM, ("--approximate",)),
    ("weave", OWN, ("--remote-code",)),
    ("weave", GLM, ("--approximate",)),
    ("weave, stock form", GLM, ("--approximate",)),
    ("expertweaver, 64 slices", GLM, ("--approximate",)),
)
ANY_KL = ("--max-kl", "100")


def slug(*words: str) -> str:
    """A folder name."""
    return "-".join(word.strip("-").replace(", ", "-").replace(" ", "-") for word in words)


def verified(run_dir: Path, target: str, options: Sequence[str]) -> None:
    """Export and verify, unless that was done."""
    folder = run_dir / slug("export", target, *options)
    file = folder.with_suffix(".json")
    if not file.exists():
        weaver("export", run_dir, "--to", target, "--out", folder, *options)
        weaver("verify", folder, "--against", run_dir, *ANY_KL, "--json", file)


def real(runs: Path, config: Path) -> None:
    """Convert, export and verify the real model."""
    for name, target, options in EXPORTS:
        overrides = ("partition.sparsity=0.25", *CONVERSIONS[name])
        run_dir = convert(runs / slug(name), runs / "calibration", config, *overrides)
        verified(run_dir, target, options)


def real_table(runs: Path) -> str:
    """The exports of the real model that were verified."""
    rows = []
    for name, target, options in EXPORTS:
        file = runs / slug(name) / slug("export", target, *options)
        if file.with_suffix(".json").exists():
            words = " ".join((target, *options))
            rows.append((name, words, *_cells(json.loads(file.with_suffix(".json").read_text()))))
    headers = (
        *("conversion", "export", "run by", "tokens", "KL", "top-10 difference, largest (mean)"),
        *("top-1 agreement", "experts agree", "same greedy text"),
    )
    return markdown_table(headers, rows)


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    def form(key: str, pattern: str) -> str:
        return "-" if result[key] is None else pattern.format(result[key])

    mean = form("mean_logprob_difference", " ({:.4f})")
    return (
        f"{result['loaded_as']}, {result['dtype']}",
        str(result["tokens"]),
        form("kl", "{:.2e}"),
        form("max_logprob_difference", "{:.4f}") + (mean if mean != "-" else ""),
        form("top1_agreement", "{:.2%}"),
        form("topk_agreement", "{:.3%}"),
        form("same_text", "{:.0%}"),
    )


INTRODUCTION = """# Exports, checked

Made by `scripts/make_exports.py` (`make exports`). Each row is one `weaver verify`: the export in a
process in which weaver cannot be imported, or in llama.cpp, against the converted model on weaver's
own code, on the same text. KL in nats per token; the native model computes in float32. "experts
agree": share of the selected pairs of token and expert that the export selects too. For llama.cpp
the differences are those of the ten most likely tokens' log-probabilities behind prefixes of the
text ("tokens" counts these); its rows without a KL are of a version that measured none and took 24
prefixes. Rows with `--approximate` say what leaving out costs.

## SmolLM2-135M, FFN sparsity 25%
"""


def main() -> None:
    """Measure everything and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/export_checks.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/exports"))
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--finished", action="store_true", help="Run nothing; finished rows only.")
    arguments = parser.parse_args()
    if not arguments.finished:
        real(arguments.runs, arguments.config)
    arguments.out.write_text(f"{INTRODUCTION}\n{real_table(arguments.runs)}")


if __name__ == "__main__":
    main()
