"""``weaver partition``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.options import Calibration, ConfigFile, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import make_context, run_stage
from weaver.config import PartitionConfig, RouterConfig, load_section, load_seed


def partition(
    run_dir: RunDir,
    method: Annotated[
        str | None,
        typer.Option(help="expertweaver, cmoe, flap, wanda-sp, random or weight-kmeans."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of FFN neurons that a token leaves out.")
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="Slices of the FFN, shared ones counted in.")
    ] = None,
    expert_width_multiple: Annotated[
        int | None,
        typer.Option(help="Expert width is a multiple of this; the rest joins the shared expert."),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="Active neurons per layer: uniform or adaptive.")
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--one-shot",
            help="Profile each layer behind the converted ones before it; default: as the paper.",
        ),
    ] = None,
    calibration: Calibration = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    seed: Seed = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Split every FFN into shared and routed experts.

    A method's own options are set by --set partition.options.NAME=VALUE.
    """
    flags = {
        "method": method,
        "sparsity": sparsity,
        "num_experts": num_experts,
        "expert_width_multiple": expert_width_multiple,
        "allocation": allocation,
        "sequential": sequential,
    }
    settings = load_section(PartitionConfig, "partition", config, overrides or [], flags)
    router = load_section(RouterConfig, "router", config, overrides or [], {})
    from weaver.stages.partition import partition as stage
    from weaver.stages.partition import propagating

    context = make_context(
        run_dir,
        seed=load_seed(config, overrides or [], seed),
        force=force,
        dry_run=dry_run,
        data_dir=None,
    )
    run_stage(context, "partition", lambda c: stage(c, propagating(settings, router), calibration))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("partition")(partition)
