"""Make docs/headline.md and docs/headline.svg: quality, speed, size and runtimes side by side.

Takes the models that ``make_results.py`` leaves in the run directories of its main table, times
each against the dense model, and asks which export holds it exactly. What was timed is not timed
again; run it alone, other work on the machine makes times longer.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conversions import read_json, weaver
from results_rows import RUNS, Row, Setting, settings

from weaver.artifacts.bench_results import BenchResult, BenchRow
from weaver.export.registry import OWN, choose
from weaver.models.converted_folder import ConvertedCheckpoint
from weaver.report.plots import paths_plot
from weaver.report.tables import format_number, markdown_table

PREFILL = 512
TIMING = ("--tokens", str(PREFILL), "--repeats", "5", "--set", "bench.warmup=1")
# The runtimes that have the architecture of an export.
RUNTIMES = {
    "glm4-moe": "transformers, vLLM, SGLang, llama.cpp",
    "granite-moe-shared": "transformers, vLLM",
    OWN: "transformers with weaver's code",
}


@dataclass(frozen=True)
class Measured:
    """One conversion: what ``eval`` and ``bench`` measured, and where it lies."""

    row: Row
    run_dir: Path
    evaluated: dict[str, Any]
    bench: BenchResult

    def timed(self, phase: str) -> BenchRow:
        """The one row of a phase."""
        (found,) = [row for row in self.bench.rows if row.phase == phase]
        return found

    @property
    def weights_mib(self) -> float:
        """Size of the model's weights, in MiB."""
        files = (self.run_dir / "model").glob("*.safetensors")
        return sum(file.stat().st_size for file in files) / 2**20

    @property
    def runtimes(self) -> str:
        """Where the model runs exactly as converted."""
        folder = ConvertedCheckpoint(self.run_dir / "model")
        return RUNTIMES[choose(folder, torch.bfloat16)[0]]


def measure(setting: Setting, row: Row, threads: str) -> Measured:
    """Time a conversion unless that was done."""
    run_dir = setting.run_dir(row)
    file = run_dir / "bench" / "results.json"
    if not file.exists():
        weaver("bench", "--run-dir", run_dir, "--force", "--threads", threads, *TIMING)
    result = BenchResult.from_flat_rows(json.loads(file.read_text()))
    return Measured(row, run_dir, read_json(run_dir / "eval" / "results.json"), result)


def table(found: list[Measured]) -> str:
    """One row per conversion, behind the dense model."""
    headers = (
        "converted by",
        "FFN sparsity",
        "FFN FLOPs",
        "KL",
        "perplexity",
        f"prefill {PREFILL}, tokens/s",
        "decode, tokens/s",
        "weights, MiB",
        "runs in",
    )
    rows = []
    for each in found:
        dense_flops = each.evaluated["dense"]["ffn_flops_per_token"]
        perplexity = each.evaluated["moe"]["perplexity"]
        rows.append(
            (
                each.row.name,
                f"{each.row.partition.sparsity:.0%}",
                f"{each.evaluated['measured_ffn_flops_per_token'] / dense_flops:.3f}",
                f"{each.evaluated['kl']:.3f}",
                format_number(perplexity),
                speed(each.timed("prefill")),
                speed(each.timed("decode")),
                f"{each.weights_mib:.0f}",
                each.runtimes,
            )
        )
    return markdown_table(headers, rows)


def speed(row: BenchRow) -> str:
    """Tokens per second of a conversion, and over the dense model that ran in turn with it."""
    return f"{row.moe_tokens_per_second:.0f} ({row.speedup:.2f}x)"


def main() -> None:
    """Time what is missing and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=RUNS, help="Of make_results.py.")
    parser.add_argument("--out", type=Path, default=Path("docs/headline.md"))
    parser.add_argument("--threads", default="2", help="Threads of torch.")
    arguments = parser.parse_args()
    (setting,) = [each for each in settings(arguments.runs) if each.name == "main"]
    rows = [
        row for row in setting.rows if (setting.run_dir(row) / "eval" / "results.json").exists()
    ]
    found = [measure(setting, row, arguments.threads) for row in rows]
    header = found[0].bench.header
    paths: dict[str, list[tuple[float, float]]] = {}
    for each in sorted(found, key=lambda each: each.row.partition.sparsity):
        name = each.row.name.removesuffix(", one slice less")
        point = each.timed("decode").speedup, each.evaluated["kl"]
        paths.setdefault(name, []).append(point)
    title = "KL to the dense model by decoding speed over dense: right and low is better"
    picture = arguments.out.with_suffix(".svg")
    picture.write_text(
        paths_plot(title, "speed-up while decoding, from 25% to 50% sparsity", paths)
    )
    place = f"{header.device}, {header.threads} threads, {header.dtype}"
    dense = [each.timed("decode").dense_tokens_per_second for each in found]
    dense_prefill = [each.timed("prefill").dense_tokens_per_second for each in found]
    text = HEADER.format(
        place=place,
        picture=picture.name,
        perplexity=format_number(found[0].evaluated["dense"]["perplexity"]),
        prefill=f"{min(dense_prefill):.0f} to {max(dense_prefill):.0f}",
        decode=f"{min(dense):.0f} to {max(dense):.0f}",
    )
    arguments.out.write_text(f"{text}\n{table(found)}")


HEADER = """# Quality, speed, size and runtimes

Made by `scripts/make_headline.py` from the conversions of the main table in `results.md`
(SmolLM2-135M-Instruct, dequantised from Q4_1; calibrated on tasks and domains, measured on raw
WikiText-2). Times are medians on one machine: {place}. In brackets: the
speed-up over the dense model, which runs in turn with each conversion, as the median over rounds.
The dense model has perplexity {perplexity}; it took in {prefill} and decoded {decode} tokens per
second in these runs. The last column names the runtimes whose architecture holds the conversion
exactly.

![KL by decoding speed]({picture})
"""

if __name__ == "__main__":
    main()
