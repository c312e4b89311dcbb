"""Measure the two paths of the MoE FFN against the dense FFN, and where they cross.

The table goes into docs/benchmarks.md; the constants of the cost model in weaver/kernels/ops.py are
read off it. All three functions run in turn in one process, so the ratios hold on a noisy machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.evaluation.speed import device_header
from weaver.evaluation.timing import interleave
from weaver.kernels.ops import choose_path, grouped_forward
from weaver.kernels.reference import Routing, masked_forward
from weaver.report.tables import format_ratio, markdown_table

# (hidden size, intermediate size, experts in all, shared ones): SmolLM2-135M with CMoE's and
# ExpertWeaver's layouts, and a layer of a 1B model.
LAYOUTS = ((576, 1536, 8, 3), (576, 1536, 64, 24), (2048, 8192, 8, 3), (2048, 8192, 64, 24))
TOKENS = (1, 16, 128, 1024)


def measure(
    layout: tuple[int, int, int, int], tokens: int, dtype: torch.dtype, sparsity: float
) -> tuple[object, ...]:
    """One row: the paths' speed-ups over the dense FFN."""
    hidden, neurons, experts, shared = layout
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    width = neurons // experts
    weights = GluWeights(
        normal(neurons, hidden), normal(neurons, hidden), normal(neurons, hidden), "silu"
    )
    x_TD = normal(tokens, hidden)
    routed = experts - shared
    top_k = round(experts * (1 - sparsity)) - shared
    ids_TK = torch.rand(tokens, routed, generator=generator).topk(top_k).indices
    routing = Routing.of_top_k(ids_TK, torch.ones(tokens, top_k), routed)
    functions: dict[str, Callable[[], object]] = {
        "dense": lambda: glu_forward(x_TD, weights),
        "masked": lambda: masked_forward(x_TD, weights, routing, shared * width),
        "grouped": lambda: grouped_forward(x_TD, weights, routing, shared * width),
    }
    repeats = max(3, min(30, 10**11 // (tokens * neurons * hidden * 3)))
    with torch.inference_mode():
        timings = interleave(functions, repeats=repeats, warmup=2)  # type: ignore[arg-type]
    dense = timings["dense"].median
    return (
        f"{hidden} x {neurons}",
        f"{shared} + {top_k} of {routed} x {width}",
        tokens,
        f"{1e3 * dense:.3f}",
        format_ratio(dense / timings["masked"].median),
        format_ratio(dense / timings["grouped"].median),
        choose_path(weights, routing, shared * width),
    )


def main() -> None:
    """Measure all layouts and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = [INTRODUCTION]
    for dtype in (torch.bfloat16, torch.float32):
        header = device_header(dtype)
        parts.append(f"## {header.dtype}, {header.device}, {header.threads} thread(s)\n")
        rows = [
            measure(layout, tokens, dtype, sparsity)
            for layout in LAYOUTS
            for tokens in TOKENS
            for sparsity in (0.25, 0.5)
        ]
        parts.append(markdown_table(HEADERS, rows))
    arguments.out.write_text("\n".join(parts))


HEADERS = (
    "D x F",
    "shared + top-k of experts",
    "tokens",
    "dense ms",
    "masked",
    "grouped",
    "chosen",
)

INTRODUCTION = """# Benchmarks

Made by `scripts/bench_paths.py`: one FFN, uniform random routing, medians of interleaved runs, the
router itself left out. "masked" computes every neuron, so that values above 1 are noise; "grouped"
runs one GEMM per expert on the tokens that chose it. The bound at 25% sparsity is 1.33x, at 50% 2x.
`weaver bench` measures whole models.
"""

if __name__ == "__main__":
    main()
