"""Measure what a conversion costs: seconds and peak memory of calibrate to assemble.

Converts a model at several numbers of calibration tokens, and copies of it that have fewer layers,
each stage in a process of its own as a user runs it. The table goes into docs/conversion_cost.md.
Other work on the machine makes the times longer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from weaver.config.sections import ModelConfig
from weaver.evaluation.speed import device_header
from weaver.models.checkpoint import Checkpoint
from weaver.report.tables import format_bytes, markdown_table

STAGES = ("calibrate", "partition", "build-router", "assemble")
FOLDERS = ("calibrate", "partition", "router", "model")


@dataclass(frozen=True)
class Cost:
    """Of one conversion.

    Args:
        layers: decoder layers of the model.
        tokens: calibration tokens.
        seconds: wall time of each stage's process, in the order of ``STAGES``.
        peak_bytes: the largest peak memory of a stage.
    """

    layers: int
    tokens: int
    seconds: tuple[float, ...]
    peak_bytes: int


def truncated(model: Path, layers: int, out: Path) -> Path:
    """A copy of a checkpoint with its first layers only."""
    out.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, out)
    checkpoint = Checkpoint(ModelConfig(path=str(model)))
    dropped = tuple(
        f"{checkpoint.family.layers}.{layer}." for layer in range(layers, checkpoint.num_layers)
    )
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        found = load_file(path).items()
        tensors |= {name: value for name, value in found if not name.startswith(dropped)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": layers}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == checkpoint.num_layers:
            config[key] = value[:layers]  # one entry per layer, such as layer_types
    (out / "config.json").write_text(json.dumps(config))
    return out


def convert(model: Path, layers: int, tokens: int, data: list[str], work: Path) -> Cost:
    """Time one conversion in a fresh run directory."""
    run_dir = work / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    weaver = [sys.executable, "-m", "weaver"]
    arguments = {
        "calibrate": [str(model), "--tokens", str(tokens), *data],
        "partition": ["--sparsity", "0.25"],
        "assemble": ["--no-smoke-test"],
    }
    seconds = []
    for stage in STAGES:
        command = [*weaver, stage, "--run-dir", str(run_dir), *arguments.get(stage, [])]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    manifests = [json.loads((run_dir / name / "manifest.json").read_text()) for name in FOLDERS]
    peak = max(manifest["peak_memory_bytes"] for manifest in manifests)
    cost = Cost(layers, tokens, tuple(seconds), peak)
    print(cost, flush=True)
    return cost


def main() -> None:
    """Convert at every size and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--data", nargs="+", default=["builtin:calibration"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--layers", type=int, nargs="+", help="Sizes of the shortened copies.")
    parser.add_argument("--out", type=Path, default=Path("docs/conversion_cost.md"))
    arguments = parser.parse_args()
    checkpoint = Checkpoint(ModelConfig(path=str(arguments.model)))
    depth = checkpoint.num_layers
    data = [word for location in arguments.data for word in ("--data", location)]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        costs = [convert(arguments.model, depth, tokens, data, work) for tokens in arguments.tokens]
        for layers in arguments.layers or (depth // 3, 2 * depth // 3):
            short = truncated(arguments.model, layers, work / f"layers{layers}")
            costs.append(convert(short, layers, min(arguments.tokens), data, work))
    rows = [
        (
            cost.layers,
            cost.tokens,
            *(f"{seconds:.0f}" for seconds in cost.seconds),
            f"{sum(cost.seconds):.0f}",
            f"{1e6 * sum(cost.seconds[:2]) / (cost.layers * cost.tokens):.0f}",
            format_bytes(cost.peak_bytes),
        )
        for cost in costs
    ]
    headers = (
        "layers",
        "tokens",
        *STAGES,
        "seconds in all",
        "us per layer and token (first two)",
        "peak memory",
    )
    header = device_header(checkpoint.dtype)
    text = HEADER.format(
        model=arguments.model.name,
        dtype=header.dtype,
        device=header.device,
        cores=len(os.sched_getaffinity(0)),
        torch=torch.__version__,
    )
    arguments.out.write_text(f"{text}\n{markdown_table(headers, rows)}\n")


HEADER = """# What a conversion costs

Made by `scripts/bench_conversion.py`: weave with its defaults at 25% FFN sparsity on {model} and on
copies of it with fewer layers; {dtype}, {cores} cores ({device}), torch {torch}. Seconds of wall
time of each stage as its own process, start of Python included; peak memory is the largest of the
four. The smoke test of assemble is left out: it loads whole models.
"""

if __name__ == "__main__":
    main()
