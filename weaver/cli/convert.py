"""``weaver convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weaver.cli.options import (
    AsJson,
    Calibration,
    ConfigFile,
    Data,
    DataDir,
    Device,
    Force,
    Overrides,
    Quiet,
    Seed,
)
from weaver.cli.session import Output, console, make_context
from weaver.config.loading import load_run_config


def convert(
    model: Annotated[str, typer.Argument(help="Folder with safetensors, .gguf file or hub name.")],
    out: Annotated[Path, typer.Argument(help="Run directory; the model is its folder model.")],
    sparsity: Annotated[
        float | None,
        typer.Option(help="FFN neurons that a token skips, a share. \\[default: 0.25]"),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method. \\[default: weave]")] = None,
    data: Data = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="auto, float32, ...; float32 is faster on CPUs without 16-bit products."),
    ] = None,
    calibration: Calibration = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    device: Device = None,
    force: Force = False,
    data_dir: DataDir = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Convert a model: every stage from calibrate to assemble that is missing."""
    flags: dict[str, dict[str, Any]] = {
        "model": {"path": model, "dtype": dtype},
        "calibrate": {"data": data, "tokens": tokens},
        "partition": {"sparsity": sparsity, "method": method},
    }
    settings = load_run_config(config, overrides or [], flags, seed)
    from weaver.stages.pipeline import conversion_calls, run_pipeline

    output = Output(quiet, as_json)
    context = make_context(
        out,
        output,
        seed=settings.seed,
        force=force,
        dry_run=False,
        data_dir=data_dir,
        trust_remote_code=settings.model.trust_remote_code,
        device=device or settings.device,
    )
    run_pipeline(
        context,
        conversion_calls(settings, calibration),
        lambda stage, manifest: output.stage(stage, manifest, context.folder(stage)),
    )
    output.finish(single=False)
    if output.shows_tables:
        console.print(f"model: {out / 'model'}", markup=False)
        console.print(f'try it: weaver generate {out} "The whale"', markup=False)
