"""Make docs/dive_results.md: DIVE against FLAP at one active size, before and after training.

Both read the same text of every domain and train for the same number of tokens with the same
low-rank adapters and rates; what is measured is the last document or two of each domain, which
neither has seen. DIVE spends a part of its steps on the routers alone, as the paper does. Finished
stages are skipped.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conversions import read_json, set_words, weaver

from weaver.report.tables import markdown_table

HELD_OUT_CHARACTERS = 4500
DOMAIN_TOKENS = 1024
STAGES = ("partition", "build-router", "assemble")
METHODS = ("flap", "dive")
EVAL = ("eval.sequence_length=512", "eval.windows=40")
ADAPTERS = "lora: {rank: 8, alpha: 16, targets: [ffn], also: [router, norms]}"
SHAPE = (
    "objective: next-token, batch_size: 4, sequence_length: 256, learning_rate: 5.0e-4, "
    "balance_update: 0"
)
ROUTER = f"{{trainable: router, temperature: 1.0, schedule: constant, {SHAPE}, steps: %d}}"
EXPERTS = f"{{trainable: lora, {ADAPTERS}, {SHAPE}, steps: %d}}"


def write_texts(data_dir: Path, folder: Path) -> list[str]:
    """Every domain without its last documents, which become the text that is measured.

    Returns:
        Names of the domains.
    """
    paths = sorted((data_dir / "domains").glob("*.jsonl"))
    (folder / "train").mkdir(parents=True, exist_ok=True)
    held_out = []
    for path in paths:
        rows = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        kept = len(rows)
        while sum(map(len, rows[kept:])) < HELD_OUT_CHARACTERS:
            kept -= 1
        _write(folder / "train" / path.name, rows[:kept])
        held_out.append("\n\n".join(rows[kept:]))
    _write(folder / "held_out.jsonl", held_out)
    return [path.stem for path in paths]


def _write(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run_method(method: str, runs: Path, domains: int, steps: int) -> None:
    """Convert, measure, train, measure again."""
    run_dir, config = runs / method, Path(f"configs/smollm2-{method}.yaml")
    train, held_out = runs / "texts/train", runs / "texts/held_out.jsonl"
    common: list[str | Path] = ["--config", config, "--run-dir", run_dir]
    calibrate = [f"calibrate.data=[{train}]", f"calibrate.tokens={domains * DOMAIN_TOKENS}"]
    weaver("calibrate", *common, *set_words(calibrate))
    partition = ["partition.sparsity=0.5"]
    if method == "dive":
        partition += ["partition.num_experts=4", "partition.options.affinity_windows=1"]
    for stage in STAGES:
        weaver(stage, *common, *set_words(partition))
    before = run_dir / "before.json"
    evaluate = set_words([f"eval.data=[{held_out}]", *EVAL])
    if not before.exists():
        weaver("eval", *common, *evaluate)
        (run_dir / "eval/results.json").rename(before)
    routers = steps // 6 if method == "dive" else 0
    phases = [ROUTER % routers] * bool(routers) + [EXPERTS % (steps - routers)]
    training = [f"finetune.data=[{train}]", f"finetune.phases=[{', '.join(phases)}]"]
    training += ["finetune.best_by=perplexity", "finetune.evaluate_every=30"]
    training += ["finetune.eval_data=[builtin:held-out]"]
    weaver("finetune", *common, *set_words(training))
    weaver("eval", *common, *evaluate, "--force")


def table(runs: Path) -> str:
    """Both methods, before and after."""
    cells = []
    for method in METHODS:
        before = read_json(runs / method / "before.json")
        after = read_json(runs / method / "eval/results.json")
        summary = read_json(runs / method / "finetune/manifest.json")["summary"]
        cells.append(
            (
                method,
                f"{after['total_parameters'] / 1e6:.0f}M",
                f"{after['active_parameters'] / 1e6:.1f}M",
                *(f"{each['moe']['perplexity']:.2f}" for each in (before, after)),
                *(f"{each['kl']:.3f}" for each in (before, after)),
                f"{summary['tokens']:,}",
            )
        )
    headers = (
        *("method", "parameters", "active", "perplexity, converted", "trained"),
        *("KL, converted", "trained", "tokens"),
    )
    return markdown_table(headers, cells)


def main() -> None:
    """Run both methods and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/dive"))
    parser.add_argument("--out", type=Path, default=Path("docs/dive_results.md"))
    parser.add_argument("--steps", type=int, default=36)
    arguments = parser.parse_args()
    domains = write_texts(arguments.data_dir, arguments.runs / "texts")
    for method in METHODS:
        run_method(method, arguments.runs, len(domains), arguments.steps)
    dense = read_json(arguments.runs / "flap/eval/results.json")["dense"]["perplexity"]
    affinity = read_json(arguments.runs / "dive/partition/manifest.json")["summary"]["affinity"]
    text = HEADER.format(domains=", ".join(domains), dense=dense, steps=arguments.steps)
    paragraphs = ["# DIVE against FLAP", textwrap.fill(text.strip(), 100)]
    paragraphs += [table(arguments.runs), _clusters(affinity)]
    arguments.out.write_text("\n\n".join(paragraphs) + "\n")


def _clusters(affinity: dict[str, Any]) -> str:
    experts = sorted(set(affinity["experts"]))
    named = list(zip(affinity["groups"], affinity["experts"], strict=True))
    lines = [
        f"- expert {expert}: {', '.join(name for name, chosen in named if chosen == expert)}"
        for expert in experts
    ]
    return "\n".join(["Domains of each of DIVE's experts:", "", *lines])


HEADER = """
Made by `scripts/make_dive.py` on SmolLM2-135M with text of {domains}. Half of the FFN's neurons are
active for a token in both. {steps} steps of 4 windows of 256 tokens on the next token, adapters of
rank 8 on the FFN and all norms; of DIVE's steps one sixth trains the routers alone. Measured on
about 1,000 tokens of each domain that neither calibration nor training has seen; dense perplexity
there {dense:.2f}.
"""

if __name__ == "__main__":
    main()
