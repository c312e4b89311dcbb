"""Convert a model with calibration text of your own, and compare it with the dense model.

    python examples/own_data.py MODEL TEXT RUN_DIR

TEXT is a .txt, .jsonl, .json or .parquet file, or a folder of them.
"""

from __future__ import annotations

import argparse

import weaver


def main() -> None:
    """Convert, measure on held-out text, print a table and a continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Folder, .gguf file or hub name.")
    parser.add_argument("text", help="Calibration text.")
    parser.add_argument("run_dir")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sparsity", type=float, default=0.25)
    arguments = parser.parse_args()

    # Half of the calibration is your text, the rest the text that comes with weaver.
    data = [f"{arguments.text}:0.5", "builtin:calibration:0.5"]
    run = weaver.convert(
        arguments.model,
        arguments.run_dir,
        sparsity=arguments.sparsity,
        sections={"calibrate": {"data": data, "tokens": arguments.tokens, "sequence_length": 256}},
    )
    quality = run.evaluate(sequence_length=256, windows=4)
    print(
        f"KL {quality.kl:.4f}, perplexity {quality.dense.perplexity:.2f} dense, "
        f"{quality.moe.perplexity:.2f} converted"
    )

    model, tokenizer = weaver.load(run)
    inputs = tokenizer("The river", return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))


if __name__ == "__main__":
    main()
