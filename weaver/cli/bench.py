"""``weaver bench`` for the models of a run, ``weaver bench-layer`` for one FFN."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.session import console
from weaver.cli.stage_command import SharedOptions, StageCall, section_command, stage_command
from weaver.config.sections import BenchConfig
from weaver.errors import WeaverError

if TYPE_CHECKING:
    from weaver.artifacts.bench_results import BenchResult


class Level(StrEnum):
    """Part of an FFN that is timed: with its router, or without it."""

    LAYER = "layer"
    KERNEL = "kernel"


class RoutingPattern(StrEnum):
    """Source of the routing of single FFNs."""

    REAL = "real"
    UNIFORM = "uniform"
    SKEWED = "skewed"


@stage_command(
    "bench", BenchConfig, ("tokens", "decode_tokens", "repeats", "seconds", "threads", "dtype")
)
def bench(settings: BenchConfig, _options: SharedOptions) -> StageCall:
    """Time the converted model against the dense one: in turn, in one process."""
    from weaver.stages.bench import bench as stage

    return lambda context: stage(context, settings)


@section_command(
    "bench",
    BenchConfig,
    ("tokens", "repeats", "seconds", "threads", "dtype"),
    shared=("config", "overrides", "seed", "trust_remote_code"),
)
def bench_layer(
    settings: BenchConfig,
    options: SharedOptions,
    *,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", "-r", help="Time FFNs of this run; or name sizes.")
    ] = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="FFN of the run to time; may be repeated.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help="Time an FFN of random weights: its hidden size.")
    ] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Intermediate size of that FFN.")
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="Slices of that FFN, shared ones included. \\[default: 8]")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="FFN sparsity of that FFN. \\[default: 0.25]")
    ] = None,
    level: Annotated[
        Level, typer.Option(help="The FFN with its router (layer) or without it (kernel).")
    ] = Level.LAYER,
    routing: Annotated[
        RoutingPattern | None,
        typer.Option(
            help="Inputs: of text, or random. \\[default: real with --run-dir, else uniform]"
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speed-ups to this file, as SVG.")
    ] = None,
) -> None:
    """Time single FFNs against the dense one: of a run, or of a size."""
    sizes = {
        "--hidden-size": hidden_size,
        "--intermediate-size": intermediate_size,
        "--num-experts": num_experts,
        "--sparsity": sparsity,
    }
    _check(run_dir, layer, {name: value for name, value in sizes.items() if value is not None})
    from weaver.stages.bench_layers import LayerSize, bench_run, bench_size

    context = options.context(run_dir)
    if run_dir is not None:
        chosen = routing or RoutingPattern.REAL
        result = bench_run(context, settings, layer or [], level.value, chosen.value)
    else:
        assert hidden_size is not None
        assert intermediate_size is not None
        size = LayerSize(
            hidden_size,
            intermediate_size,
            8 if num_experts is None else num_experts,
            0.25 if sparsity is None else sparsity,
        )
        chosen = routing or RoutingPattern.UNIFORM
        result = bench_size(context, settings, size, level.value, chosen.value)
    _report(result, json_file, plot)


def _check(run_dir: Path | None, layer: list[int] | None, sizes: dict[str, float]) -> None:
    """Either FFNs of a run or a size is timed; flags that would do nothing are errors."""
    example = "weaver bench-layer --hidden-size 2048 --intermediate-size 8192"
    if run_dir is not None and sizes:
        raise WeaverError(
            f"{', '.join(sizes)} would do nothing for the FFNs of a run",
            why="the run says how large its FFNs are and how they are split",
            fix=f"leave {' and '.join(sizes)} out, or --run-dir",
        )
    if run_dir is None and not {"--hidden-size", "--intermediate-size"} <= sizes.keys():
        raise WeaverError(
            "nothing to time",
            why="bench-layer times FFNs of a run, or one whose hidden and intermediate size are "
            "given",
            fix=f"weaver bench-layer --run-dir RUN, or {example}",
        )
    if run_dir is None and layer:
        raise WeaverError(
            "--layer would do nothing for the size of an FFN",
            why="it names an FFN of a run",
            fix="leave --layer out, or name a --run-dir",
        )


def _report(result: BenchResult, json_file: Path | None, plot: Path | None) -> None:
    from weaver.artifacts.store import write_json, write_text
    from weaver.cli.show_speeds import show_bench
    from weaver.report.plots import speedup_plot

    show_bench(console, result)
    if json_file is not None:
        write_json(json_file, result.flat_rows())
    if plot is not None:
        write_text(plot, speedup_plot(result))
