"""Make docs/roofline.md: what a byte and FLOP model predicts for the GPU path. No GPU is needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from weaver.kernels.roofline import (
    DEVICES,
    NOTE,
    SHAPES,
    Device,
    dense_launches,
    moe_launches,
    roofline_rows,
)
from weaver.report.tables import format_percent, format_ratio, markdown_table

MODEL = "Llama-3-8B"
TOKENS = (1, 4, 16, 128, 512, 2048)
SPARSITIES = (0.25, 0.5)
SLICES = (8, 64)


def device_table() -> str:
    """The figures that everything is made of."""
    rows = []
    for name, device in DEVICES.items():
        figures = (device.matrix_flops / 1e12, device.vector_flops / 1e12, device.bandwidth / 1e12)
        rows.append((name, *(f"{value:g}" for value in figures)))
    return markdown_table(("device", "16-bit TFLOP/s", "float32 TFLOP/s", "TB/s"), rows)


def layer_table(device: str) -> str:
    """One model's FFN in detail."""
    rows = [
        (
            f"{row.sparsity:.0%}",
            row.experts,
            row.tokens,
            row.variant,
            f"{row.dense_us:.0f}",
            f"{row.moe_us:.0f}",
            format_ratio(row.speedup),
            format_ratio(row.bound),
            format_percent(row.share),
            format_ratio(row.end_to_end_bound),
        )
        for row in roofline_rows(device, [MODEL], TOKENS, SPARSITIES, SLICES)
    ]
    columns = ("sparsity", "slices", "tokens", "variant", "dense us", "MoE us", "speed-up", "bound")
    return markdown_table((*columns, "share of bound", "end-to-end bound"), rows)


def model_table(device: str) -> str:
    """The speed-up of one FFN of every model, with the bound in brackets."""
    rows = roofline_rows(device, None, TOKENS, SPARSITIES, SLICES)
    lines = []
    for case, group in groupby(rows, lambda row: (row.model, f"{row.sparsity:.0%}", row.experts)):
        cells = (f"{format_ratio(row.speedup)} ({format_ratio(row.bound)})" for row in group)
        lines.append((*case, *cells))
    return markdown_table(("model", "sparsity", "slices", *map(str, TOKENS)), lines)


def launch_table(device: Device, tokens: Sequence[int]) -> str:
    """Where the time of a converted FFN goes: 25%, 8 slices."""
    shape = SHAPES[MODEL]
    layer = shape.layer(0.25, 8)
    lines = []
    for count in tokens:
        dense = dense_launches(count, shape.hidden_size, shape.intermediate_size)
        lines.append((count, "dense FFN", len(dense), f"{1e6 * device.seconds(dense):.0f}"))
        for name, group in groupby(moe_launches(layer, count), lambda launch: launch.name):
            launches = list(group)
            lines.append((count, name, len(launches), f"{1e6 * device.seconds(launches):.0f}"))
    return markdown_table(("tokens", "what", "launches", "us"), lines)


def assumption_table(device: Device) -> str:
    """The speed-up of one FFN of 8 slices where an assumption is another one."""
    changes: dict[str, Device] = {"as assumed": device}
    for microseconds in (0.0, 1.0, 5.0):
        changed = replace(device, launch_seconds=1e-6 * microseconds)
        changes[f"{microseconds:g} us per launch"] = changed
    for share in (0.6, 0.5, 0.4):
        changes[f"Triton's GEMMs at {share:g} of the peak"] = replace(device, routed_share=share)
    shape = SHAPES[MODEL]
    cases = [(sparsity, tokens) for sparsity in SPARSITIES for tokens in (1, 512, 2048)]
    lines = []
    for name, changed in changes.items():
        cells = []
        for sparsity, tokens in cases:
            dense = dense_launches(tokens, shape.hidden_size, shape.intermediate_size)
            moe = moe_launches(shape.layer(sparsity, 8), tokens)
            cells.append(format_ratio(changed.seconds(dense) / changed.seconds(moe)))
        lines.append((name, *cells))
    columns = [f"{sparsity:.0%}, {tokens} tokens" for sparsity, tokens in cases]
    return markdown_table(("assumption", *columns), lines)


TEXT = """# Roofline of the GPU path

{note}

Made by `scripts/make_roofline.py`; `scripts/bench_gpu.py` measures, where there is a GPU. Below
1.00x the converted FFN is predicted to be slower than the dense one. What the tables say:

- From about 16 tokens to some hundred, tokens that are routed independently read every expert
  together, and reading is what costs: no kernel can gain anything.
- At one token it is launches that keep the gain below the bound: those of the router, one small
  operation after the other, and of the shared and the routed experts in sequence.
- A long prompt gains if Triton's GEMMs come close to a library's, and more from 8 slices than from
  64, whose pairs are too many to store.

## The model

A launch lasts `launch + max(FLOPs / (share * FLOP/s), bytes / (share * bytes/s))`; an FFN lasts as
long as its launches, one after the other (`weaver/kernels/roofline.py`).

{devices}
These are figures of data sheets, of products with float32 sums and without sparsity. The rest is
assumed: {launch:g} us per launch, as in a CUDA graph; GEMMs, Triton's included, reach {gemm:.0%} of
the peak, and every kernel {memory:.0%} of the bandwidth.

- Dense FFN and shared expert: three GEMMs, and one pass for the activation.
- Router: in float32, with all the small operations of the present code as launches of their own.
- Up to 4 tokens: two launches that read the union of the experts. With independent uniform routing
  T tokens use `E (1 - (1 - K/E)^T)` of E experts.
- More tokens: sorting and tiling, again launch by launch; gate and up over tiles of pairs of token
  and expert, whose rows are gathered; then, as the byte model in `weaver/kernels/gpu/variants.py`
  chooses with the H100 in mind, a product per pair, a store and a sum ("pairs"), or zeros and one
  GEMM over all neurons ("dense"). An expert's tokens are binomially distributed; their last tile
  computes as long as a full one.
- Bound: `max(FLOPs / FLOP/s, bytes / bytes/s)` of the neurons that are active and of those that are
  read, each once, at full rates. End to end it has attention and head too; up to 16 tokens are a
  step of as many sequences with 512 positions each, more are one prompt.

About a quarter of the active slices are shared, in whole slices.

Left out: caches; grids too small to fill a GPU (the down projection of one token is 64 to 128
programs, which are unlikely to reach the bandwidth), waves and tails; clocks under load; the choice
of computing all neurons where that is measured to be faster; real routing, which is less even, and
more alike from token to token; biases and constants of experts, thresholds instead of top-k; the
time that Python takes outside of a CUDA graph; whether a model fits into memory.

## H100

One FFN of {model}:

{h100}
Speed-up of one FFN and its bound, by tokens:

{h100_models}
Where the time goes, at 25% with 8 slices:

{launches}
What the assumptions do, with 8 slices:

{assumptions}
Routed GEMMs break even where they reach K/E of the dense GEMM's rate.

## A100

One FFN of {model}:

{a100}
Speed-up of one FFN and its bound, by tokens:

{a100_models}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/roofline.md"))
    arguments = parser.parse_args()
    h100 = DEVICES["h100"]
    text = TEXT.format(
        note=NOTE,
        devices=device_table(),
        launch=1e6 * h100.launch_seconds,
        gemm=h100.gemm_share,
        memory=h100.memory_share,
        model=MODEL,
        h100=layer_table("h100"),
        h100_models=model_table("h100"),
        launches=launch_table(h100, (1, 2048)),
        assumptions=assumption_table(h100),
        a100=layer_table("a100"),
        a100_models=model_table("a100"),
    )
    arguments.out.write_text(text)
    print(f"{arguments.out}: {NOTE}")


if __name__ == "__main__":
    main()
