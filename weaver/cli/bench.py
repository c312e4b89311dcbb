"""``weaver bench``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.options import ConfigFile, DryRun, Force, Overrides, Seed
from weaver.cli.session import console, make_context, run_stage
from weaver.config.loading import load_section, load_seed
from weaver.config.sections import BenchConfig
from weaver.errors import WeaverError

if TYPE_CHECKING:
    from weaver.artifacts.bench_results import BenchResult, FfnLevel


class Level(StrEnum):
    """Part of a model that is timed: the whole, an FFN with its router, or an FFN without it."""

    MODEL = "model"
    LAYER = "layer"
    KERNEL = "kernel"


class Routing(StrEnum):
    """Where the routing of single FFNs comes from."""

    REAL = "real"
    UNIFORM = "uniform"
    SKEWED = "skewed"


# What can be timed or predicted, and the flags that mean something there.
_TIMING = {"--tokens", "--repeats", "--threads", "--dtype", "--config", "--set", "--seed"}
_FFN = _TIMING | {"--level", "--routing", "--json", "--plot"}
_SIZES = {"--hidden-size", "--intermediate-size", "--num-experts", "--sparsity"}
FLAGS = {
    "whole models": _TIMING | {"--run-dir", "--level", "--decode-tokens", "--force", "--dry-run"},
    "FFNs of a run": _FFN | {"--run-dir", "--layer"},
    "the size of an FFN": _FFN | _SIZES,
    "a roofline": {"--roofline", "--tokens"},
}


def bench(
    context: typer.Context,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", "-r", help="Folder of a run; or name sizes, or a roofline."),
    ] = None,
    level: Annotated[
        Level, typer.Option(help="Whole models, or one FFN with (layer) or without its router.")
    ] = Level.MODEL,
    tokens: Annotated[
        str | None, typer.Option(help="Tokens in one forward, such as 1,128,512.")
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded with a KV cache; 0 for none.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as the dense model), float32, bfloat16, float16.")
    ] = None,
    routing: Annotated[
        Routing | None,
        typer.Option(
            help="Inputs of single FFNs: recorded on text, or random. [default: real with "
            "--run-dir, else uniform]"
        ),
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
    num_experts: Annotated[int, typer.Option(help="Slices of that FFN, shared ones included.")] = 8,
    sparsity: Annotated[float, typer.Option(help="FFN sparsity of that FFN.")] = 0.25,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the rows of single FFNs here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speed-ups of single FFNs here, as SVG.")
    ] = None,
    roofline: Annotated[
        str | None,
        typer.Option(help="Predict the GPU kernels on a100, h100, h200, b200, rtx3090 or mi300x."),
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Time the converted model, or single FFNs, against the dense one: in turn, in one process."""
    flags = {
        "tokens": None if tokens is None else tokens.split(","),
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "threads": threads,
        "dtype": dtype,
    }
    settings = load_section(BenchConfig, "bench", config, overrides or [], flags)
    sizes = (hidden_size, intermediate_size)
    is_size = any(size is not None for size in sizes)
    if roofline is not None:
        _refuse_others(context, "a roofline")
        _show_roofline(roofline, None if tokens is None else settings.tokens)
        return
    _check(run_dir, level, sizes, is_size=is_size)
    of_run = "whole models" if level == Level.MODEL else "FFNs of a run"
    _refuse_others(context, "the size of an FFN" if is_size else of_run)
    stage_context = make_context(
        run_dir or Path(),
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=None,
    )
    if level == Level.MODEL:
        from weaver.stages.bench import bench as stage

        run_stage(stage_context, "bench", lambda c: stage(c, settings))
        return
    from weaver.stages.bench_layers import LayerSize, bench_run, bench_size

    of: FfnLevel = "layer" if level == Level.LAYER else "kernel"
    if is_size:
        assert hidden_size is not None
        assert intermediate_size is not None
        size = LayerSize(hidden_size, intermediate_size, num_experts, sparsity)
        chosen = routing or Routing.UNIFORM
        result = bench_size(stage_context, settings, size, of, chosen.value)
    else:
        chosen = routing or Routing.REAL
        result = bench_run(stage_context, settings, layer or [], of, chosen.value)
    _report(result, json_file, plot)


def _check(
    run_dir: Path | None, level: Level, sizes: tuple[int | None, int | None], *, is_size: bool
) -> None:
    """Either a run or the size of an FFN is timed."""
    if is_size and (level == Level.MODEL or None in sizes or run_dir is not None):
        raise WeaverError(
            "the size of an FFN goes with neither whole models nor a run",
            why="--hidden-size and --intermediate-size together name an FFN of random weights",
            fix="--level layer --hidden-size 2048 --intermediate-size 8192, without --run-dir",
        )
    if not is_size and run_dir is None:
        raise WeaverError(
            "nothing to time",
            why="bench times the converted model of a run, or an FFN of a given size",
            fix="--run-dir RUN, or --level layer --hidden-size 2048 --intermediate-size 8192",
        )


def _refuse_others(context: typer.Context, what: str) -> None:
    """Flags that would do nothing are errors."""
    given = set()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            given.add(next(name for name in parameter.opts if name.startswith("--")))
    if others := sorted(given - FLAGS[what]):
        raise WeaverError(
            f"{', '.join(others)} would do nothing for {what}",
            why=f"{what} can be given {', '.join(sorted(FLAGS[what]))}",
            fix=f"leave {' and '.join(others)} out, or time something else with --level",
        )


def _show_roofline(device: str, tokens: Sequence[int] | None) -> None:
    from weaver.cli.show_speeds import show_roofline
    from weaver.kernels.roofline import NOTE, roofline_rows

    try:
        rows = roofline_rows(device) if tokens is None else roofline_rows(device, tokens=tokens)
    except ValueError as error:
        raise WeaverError(
            f"no roofline for {device}", why=str(error), fix="--roofline h100"
        ) from error
    show_roofline(console, device, NOTE, rows)


def _report(result: BenchResult, json_file: Path | None, plot: Path | None) -> None:
    from weaver.artifacts.store import write_json, write_text
    from weaver.cli.show_speeds import show_bench
    from weaver.report.plots import speedup_plot
    from weaver.stages.bench import summary

    show_bench(console, summary(result))
    if json_file is not None:
        write_json(json_file, result.flat_rows())
    if plot is not None:
        write_text(plot, speedup_plot(result))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("bench", rich_help_panel="Stages")(bench)
