"""``weaver bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import ConfigFile, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config import BenchConfig, load_section, load_seed


def bench(
    run_dir: RunDir,
    tokens: Annotated[str | None, typer.Option(help="Prefill lengths, such as 1,128,512.")] = None,
    decode_tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded with a KV cache; 0 for none.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as the dense model), float32, bfloat16, float16.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Time the converted model against the dense one, in turn and in one process."""
    flags = {
        "tokens": None if tokens is None else tokens.split(","),
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "threads": threads,
        "dtype": dtype,
    }
    settings = load_section(BenchConfig, "bench", config, overrides or [], flags)
    from weaver.stages.bench import bench as stage

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=None,
    )
    run_stage(context, "bench", lambda c: stage(c, settings))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("bench")(bench)
