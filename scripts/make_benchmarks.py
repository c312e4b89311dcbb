"""Measure docs/benchmarks.md: single FFNs and whole models on this CPU.

Every table is one run of ``weaver bench`` in a process of its own. Other work on the machine makes
times longer and ratios less certain; run it alone. What was measured below --runs is not measured
again: an interrupted script goes on, and new numbers want a new folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from conversions import convert, weaver

from weaver.artifacts.bench_results import BenchResult
from weaver.report.speeds import bench_columns, bench_title
from weaver.report.tables import markdown_table

HIDDEN, NEURONS = 2048, 8192
SPARSITIES = (0.25, 0.5)
# By number of slices: few experts selected by a threshold, many experts and top-k.
METHODS = {8: "weave", 16: "weave", 64: "expertweaver"}
ONE_WARMUP = ("--set", "bench.warmup=1")
# Other work on the machine: a table that it disturbed is measured again, so many times at most.
SPREAD, ATTEMPTS = 1.6, 3
SIDES = ("dense", "moe")


def table(file: Path) -> str:
    """Header and table of a benchmark's rows."""
    result = BenchResult.from_flat_rows(json.loads(file.read_text()))
    rows = [row.model_dump() for row in result.rows]
    title = bench_title(result.header.model_dump())
    return f"{title}.\n\n{markdown_table(*bench_columns(rows))}"


def measured(file: Path, *command: str) -> None:
    """Run a benchmark unless its table is there; again where something else disturbed it.

    A table is disturbed if a row's p90 is more than ``SPREAD`` times its p10.
    """
    for _ in range(ATTEMPTS):
        if not file.exists() or is_disturbed(file):
            weaver(*command, *ONE_WARMUP)


def is_disturbed(file: Path) -> bool:
    """Whether times within a row differ more than the code can make them differ."""
    rows = json.loads(file.read_text())
    pairs = [(row[f"{who}_p10_ms"], row[f"{who}_p90_ms"]) for row in rows for who in SIDES]
    return any(p90 > SPREAD * p10 for p10, p90 in pairs)


def layer(
    runs: Path,
    threads: str,
    dtype: str,
    sparsity: float,
    experts: int,
    tokens: str,
    routing: str,
) -> None:
    """One FFN of random weights."""
    file = runs / f"layer-{dtype}-{sparsity:g}-{experts}-{routing}.json"
    sizes = ["--hidden-size", str(HIDDEN), "--intermediate-size", str(NEURONS)]
    layout = ["--num-experts", str(experts), "--sparsity", str(sparsity), "--dtype", dtype]
    how = ["--tokens", tokens, "--routing", routing, "--threads", threads, "--repeats", "9"]
    measured(file, "bench-layer", *sizes, *layout, *how, "--json", str(file))


def converted(runs: Path, config: Path, experts: int, sparsity: float) -> Path:
    """Run directory of a conversion; all share one calibration."""
    layout = (f"partition.num_experts={experts}", f"partition.sparsity={sparsity:g}")
    method = f"partition.method={METHODS[experts]}"
    run_dir = runs / f"{experts}-{sparsity:g}"
    return convert(run_dir, runs / "calibration", config, *layout, method)


def model(run_dir: Path, threads: str) -> None:
    """Whole models, dense and converted."""
    how = ["--tokens", "1,16,128,512", "--threads", threads, "--repeats", "5"]
    file = run_dir / "bench" / "results.json"
    measured(file, "bench", "--run-dir", str(run_dir), "--force", *how)


def finished(runs: Path) -> list[str]:
    """The tables that are there, of whole models first."""
    parts = ["## Whole model: SmolLM2-135M\n"]
    for file in sorted(runs.glob("*/bench/results.json")):
        experts, sparsity = file.parents[1].name.split("-")
        title = f"### {experts} slices, {float(sparsity):.0%}, {METHODS[int(experts)]}"
        parts.append(f"{title}\n\n{table(file)}")
    parts.append(f"## One FFN, D {HIDDEN}, F {NEURONS}\n")
    for file in sorted(runs.glob("layer-*.json")):
        _, dtype, sparsity, experts, routing = file.stem.split("-")
        title = f"### {dtype}, {experts} slices, {float(sparsity):.0%}, {routing} routing"
        parts.append(f"{title}\n\n{table(file)}")
    return parts


def main() -> None:
    """Measure everything and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--threads", default="1", help="Threads of torch.")
    parser.add_argument("--slices", type=int, nargs="+", default=list(METHODS), metavar="N")
    parser.add_argument("--convert", action="store_true", help="Only make the conversions.")
    parser.add_argument(
        "--finished", action="store_true", help="Run nothing; finished tables only."
    )
    arguments = parser.parse_args()
    runs: Path = arguments.runs
    runs.mkdir(parents=True, exist_ok=True)
    if not arguments.finished:
        layouts = [(experts, sparsity) for experts in arguments.slices for sparsity in SPARSITIES]
        run_dirs = [converted(runs, arguments.config, *layout) for layout in layouts]
        if arguments.convert:
            return
        measure(runs, run_dirs, arguments.threads)
    arguments.out.write_text("\n".join([INTRODUCTION, *finished(runs)]))


def measure(runs: Path, run_dirs: list[Path], threads: str) -> None:
    """Everything that is not there yet."""
    for run_dir in run_dirs:
        model(run_dir, threads)
    for dtype, tokens in (("bfloat16", "1,16,128,512,2048"), ("float32", "1,512,2048")):
        for sparsity in SPARSITIES:
            layer(runs, threads, dtype, sparsity, 8, tokens, "uniform")
    for sparsity in SPARSITIES:
        layer(runs, threads, "bfloat16", sparsity, 64, "1,512", "uniform")
    layer(runs, threads, "bfloat16", 0.5, 8, "1,512", "skewed")


INTRODUCTION = """# Benchmarks

Made by `scripts/make_benchmarks.py` (`make benchmarks`); every table is one process in which dense
and converted run in turn. The speed-up is the median over rounds of dense over converted, which run
one after the other in every round; times are medians of their own. One FFN is timed with its
router, as many copies after one another as do not fit into the processor's caches.
"dense" is the fastest of three: torch's linear layers, the same with neurons as rows, and weaver's
own kernel on all neurons ("dense by"). "grouped_mm" is the same layout with the experts of
transformers, routed by weaver's router. The bound is the ratio of FLOPs, and up to 4 tokens of the
weights that are read, router included. Whole models are as transformers runs them, with a KV cache;
a prefill's time is the time to the first token. The routing of whole models is that of text. Bounds
of a whole model are ratios of parameters that a token uses. A table in which a row's p90 is above
1.6 times its p10 was disturbed by other work on the machine and is measured again, twice at most.
"""

if __name__ == "__main__":
    main()
