"""Make docs/downcycling.md: continued pretraining of sparse conversions from several starts.

Every FFN loses three quarters of its active neurons; then all weights are trained on the same
tokens, from experts that weaver made and from random and weight-clustered ones. The model is small
enough for several seeds in minutes, and its training text is sampled from itself, since a real
model this small knows little else. Finished stages are skipped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from conversions import set_words, weaver
from transformers import AutoModelForCausalLM, AutoTokenizer

from weaver.report.plots import curves_plot
from weaver.report.tables import markdown_table

# 43 slices of 4 neurons: 2 shared, 8 of 41 routed, as near to the paper's 2 + 14 of 64 as 172 goes.
SHAPE = ("num_experts=43", f"sparsity={1 - 10 / 43}", "weighting=softmax", "allocation=uniform")
STARTS: Mapping[str, Sequence[str]] = {
    "expertweaver": ("method=expertweaver", f"options.shared_ratio={2 / 43}"),
    "weave": ("method=weave", "options.selection=top-k", "options.shared_share=0.2"),
    "weight-kmeans": ("method=weight-kmeans", "options.shared_experts=2"),
    "random": ("method=random", "options.shared_experts=2"),
}
PLAIN = ("router.refit=false", "router.constants=false")
SEEDS = (0, 1)
TRAINING = (
    *("preset=downcycle", "batch_size=16", "sequence_length=256", "warmup_steps=20"),
    *("evaluate_every=20", "eval_windows=32", "eval_sequence_length=256", "checkpoint_every=100"),
    *("best_by=perplexity", "precision=float32"),
)


def write_texts(model: str, folder: Path, documents: int) -> None:
    """Stories that the dense model tells, for training and held out."""
    if (folder / "held_out.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense: Any = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    start_BT = torch.full((documents, 1), dense.config.bos_token_id)
    ids_BT: Any = dense.generate(
        start_BT,
        attention_mask=torch.ones_like(start_BT),
        do_sample=True,
        top_k=0,
        min_new_tokens=255,
        max_new_tokens=255,
    )
    rows = [json.dumps({"text": tokenizer.decode(ids, skip_special_tokens=True)}) for ids in ids_BT]
    held_out = documents // 16
    (folder / "train.jsonl").write_text("\n".join(rows[held_out:]) + "\n")
    (folder / "held_out.jsonl").write_text("\n".join(rows[:held_out]) + "\n")


def run_start(name: str, seed: int, model: str, runs: Path, steps: int) -> dict[str, Any]:
    """Convert and train.

    Returns:
        The summary of the training.
    """
    run_dir, texts = runs / f"{name}-seed{seed}", runs / "texts"
    common: list[str | Path] = ["--run-dir", run_dir, "--seed", str(seed)]
    train, held_out = f"[{texts / 'train.jsonl'}]", f"[{texts / 'held_out.jsonl'}]"
    weaver("calibrate", model, *common, *set_words((f"calibrate.data={train}",)))
    partition = [f"partition.{each}" for each in (*SHAPE, *STARTS[name])]
    weaver("partition", *common, *set_words((*partition, *PLAIN)))
    weaver("build-router", *common, *set_words(PLAIN))
    weaver("assemble", *common, "--no-smoke-test")
    training = (*TRAINING, f"steps={steps}", f"data={train}", f"eval_data={held_out}")
    weaver("finetune", *common, *set_words([f"finetune.{each}" for each in training]))
    manifest: dict[str, Any] = json.loads((run_dir / "finetune/manifest.json").read_text())
    return dict(manifest["summary"])


def describe(results: Mapping[str, Sequence[dict[str, Any]]], steps: int) -> str:
    """Held-out perplexity on the way, mean over the seeds, and how soon each start gets there."""
    shown = [step for step in (0, 20, 60, 100, steps) if step <= steps]
    reference = mean(_perplexities(each)[steps] for each in results["random"])
    cells = []
    for name, summaries in results.items():
        curves = [_perplexities(summary) for summary in summaries]
        reached = [_reached(curve, reference) for curve in curves]
        cells.append(
            (
                name,
                *(f"{mean(curve[step] for curve in curves):.3f}" for step in dict.fromkeys(shown)),
                "-" if None in reached else f"{mean(step or 0 for step in reached):.0f}",
            )
        )
    steps_shown = [f"step {step}" for step in dict.fromkeys(shown)]
    headers = ("start", *steps_shown, f"steps to {reference:.3f}, random's end")
    return markdown_table(headers, cells)


def _perplexities(summary: dict[str, Any]) -> dict[int, float]:
    return {each["step"]: float(each["perplexity"]) for each in summary["evaluations"]}


def _reached(curve: Mapping[int, float], value: float) -> int | None:
    return next((step for step, perplexity in sorted(curve.items()) if perplexity <= value), None)


def main() -> None:
    """Run every start with every seed and write the document and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", default="models/stories260K-hf", help="Below --data-dir.")
    parser.add_argument("--runs", type=Path, default=Path("runs/downcycle"))
    parser.add_argument("--out", type=Path, default=Path("docs/downcycling.md"))
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--documents", type=int, default=1024, help="Sampled texts.")
    arguments = parser.parse_args()
    model = str(arguments.data_dir / arguments.model)
    write_texts(model, arguments.runs / "texts", arguments.documents)
    results = {
        name: [run_start(name, seed, model, arguments.runs, arguments.steps) for seed in SEEDS]
        for name in STARTS
    }
    dense = results["random"][0]["evaluations"][0]["dense_perplexity"]
    series = {
        name: [
            (step, mean(_perplexities(each)[step] for each in summaries))
            for step in _perplexities(summaries[0])
        ]
        for name, summaries in results.items()
    }
    plot = arguments.out.with_suffix(".svg")
    title = "held-out perplexity while training, mean over the seeds"
    plot.write_text(curves_plot(title, "step", series))
    tokens = 16 * 256
    arguments.out.write_text(
        HEADER.format(
            model=Path(model).name,
            steps=arguments.steps,
            tokens=tokens,
            dense=dense,
            plot=plot.name,
            documents=arguments.documents,
        )
        + f"\n{describe(results, arguments.steps)}\n"
    )


HEADER = """# Downcycling: sparse starts for continued pretraining

Made by `scripts/make_downcycle.py` on {model}. All layers have 43 slices of 4 neurons, 2 of them
shared, and 8 of the other 41 run for a token (FFN sparsity 76.7%), weighted by a softmax over the
chosen. All weights are then trained by `--preset downcycle` on the next token with the
load-balancing loss, {steps} steps of {tokens:,} tokens, with the same text and order for every
start. Text: {documents:,} texts of 256 tokens, sampled from the dense model, one sixteenth of them
held out; dense perplexity on those {dense:.3f}. Numbers are held-out perplexities, means over two
seeds, which change the calibration sample, the split and the order of the text; "-": not
reached with every seed.

![Held-out perplexity by step]({plot})

"""

if __name__ == "__main__":
    main()
