"""Quality, speed, size and runtimes side by side: docs/headline.md and docs/headline.svg."""

from __future__ import annotations

import torch

from tables.rows import Measured, Row
from weaver.artifacts.bench_results import BenchResult, BenchRow
from weaver.artifacts.store import write_text
from weaver.export.registry import OWN, choose
from weaver.models.converted_folder import ConvertedCheckpoint
from weaver.report.plots import paths_plot
from weaver.report.tables import format_number, markdown_table
from weaver.rundir.measurements import read_bench

# The runtimes that have the architecture of an export.
RUNTIMES = {
    "glm4-moe": "transformers, vLLM, SGLang, llama.cpp",
    "granite-moe-shared": "transformers, vLLM",
    OWN: "transformers with weaver's code",
}


def headline(measured: Measured) -> str:
    """One row per conversion, and the picture of KL by decoding speed."""
    benches = [read_bench(row.run_dir) for row in measured.rows]
    prefill = _timed(benches[0], "prefill").tokens
    headers = (
        *("converted by", "FFN sparsity", "FFN FLOPs", "KL", "perplexity"),
        *(f"prefill {prefill}, tokens/s", "decode, tokens/s", "weights, MiB", "runs in"),
    )
    rows = [
        (
            *(row.name, f"{row.sparsity:.0%}", f"{row.compared.ffn_flops:.3f}"),
            *(f"{row.result.kl:.3f}", format_number(row.compared.perplexity)),
            *(_speed(_timed(bench, phase)) for phase in ("prefill", "decode")),
            *(f"{row.compared.model_bytes / 2**20:.0f}", _runtimes(row)),
        )
        for row, bench in zip(measured.rows, benches, strict=True)
    ]
    picture = measured.page.with_suffix(".svg")
    write_text(picture, _picture(measured, benches))
    return (
        f"{_circumstances(measured.rows[0], benches)}\n\n![KL by decoding speed]({picture.name})"
        f"\n\n{markdown_table(headers, rows)}"
    )


def _circumstances(row: Row, benches: list[BenchResult]) -> str:
    header = benches[0].header
    prefill, decode = (
        [_timed(bench, phase).dense_tokens_per_second for bench in benches]
        for phase in ("prefill", "decode")
    )
    return (
        f"Machine: {header.device}, {header.threads} threads, {header.dtype}. The dense model has "
        f"perplexity {format_number(row.compared.dense_perplexity)}; it took in "
        f"{min(prefill):.0f} to {max(prefill):.0f} and decoded {min(decode):.0f} to "
        f"{max(decode):.0f} tokens per second in these runs."
    )


def _picture(measured: Measured, benches: list[BenchResult]) -> str:
    paths: dict[str, list[tuple[float, float]]] = {}
    for row, bench in zip(measured.rows, benches, strict=True):
        name = row.name.removesuffix(", one slice less")
        paths.setdefault(name, []).append((_timed(bench, "decode").speedup, row.result.kl))
    title = "KL to the dense model by decoding speed over dense: right and low is better"
    return paths_plot(title, "speed-up while decoding, from 25% to 50% sparsity", paths)


def _timed(bench: BenchResult, phase: str) -> BenchRow:
    (found,) = [row for row in bench.rows if row.phase == phase]
    return found


def _speed(row: BenchRow) -> str:
    """Tokens per second of a conversion, and over the dense model that ran in turn with it."""
    return f"{row.moe_tokens_per_second:.0f} ({row.speedup:.2f}x)"


def _runtimes(row: Row) -> str:
    """Where the model runs exactly as converted."""
    return RUNTIMES[choose(ConvertedCheckpoint(row.run_dir / "model"), torch.bfloat16)[0]]
