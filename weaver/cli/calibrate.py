"""``weaver calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import ConfigFile, Data, DataDir, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config.loading import load_model_section, load_section, load_seed
from weaver.config.sections import CalibrateConfig


def calibrate(
    run_dir: RunDir,
    model: Annotated[
        str | None, typer.Argument(help="Folder, .gguf file or hub name; or in --config.")
    ] = None,
    data: Data = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens in all.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    activation_top_k: Annotated[
        int | None, typer.Option(help="K_a, markers per token (CMoE).")
    ] = None,
    input_sample_mb: Annotated[
        float | None, typer.Option(help="FFN inputs kept per layer, megabytes.")
    ] = None,
    groups: Annotated[
        bool | None,
        typer.Option(
            "--groups/--no-groups",
            help="Keep the groups of the data apart, as many tokens of each (for --method dive).",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Let the model's own code run.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
    data_dir: DataDir = None,
) -> None:
    """Run text through the dense model and keep what every method needs to know."""
    model_flags = {
        "path": model,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "dtype": dtype,
    }
    stage_flags = {
        "data": data,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "activation_top_k": activation_top_k,
        "input_sample_mb": input_sample_mb,
        "groups": groups,
    }
    names = overrides or []
    model_config = load_model_section(config, names, model_flags)
    settings = load_section(CalibrateConfig, "calibrate", config, names, stage_flags)
    from weaver.stages.calibrate import calibrate as stage

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=data_dir,
    )
    run_stage(context, "calibrate", lambda c: stage(c, model_config, settings))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("calibrate", rich_help_panel="Stages")(calibrate)
