"""Convert a model at several sparsities on one calibration, and print quality beside cost.

python examples/sweep.py MODEL RUNS_DIR --sparsities 0.125 0.25 0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import weaver


def main() -> None:
    """Calibrate once, then convert and measure every sparsity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Folder, .gguf file or hub name.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()

    shared = weaver.Run(arguments.runs / "calibration")
    shared.calibrate(arguments.model, tokens=arguments.tokens, sequence_length=256)
    rows = []
    for sparsity in arguments.sparsities:
        run = weaver.convert(
            arguments.model,
            arguments.runs / f"{sparsity:g}",
            sparsity=sparsity,
            calibration=shared.path / "calibrate",
        )
        quality = run.evaluate(sequence_length=256, windows=4)
        flops = quality.measured_ffn_flops_per_token / quality.dense.ffn_flops_per_token
        rows.append((sparsity, flops, quality.kl, quality.moe.perplexity))
    print("sparsity  FFN FLOPs      KL  perplexity")
    for sparsity, flops, kl, perplexity in rows:
        print(f"{sparsity:8.1%}  {flops:9.3f}  {kl:6.4f}  {perplexity:10.2f}")


if __name__ == "__main__":
    main()
