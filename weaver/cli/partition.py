"""``weaver partition``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.options import Calibration, ConfigFile, DryRun, Force, Overrides, RunDir, Seed
from weaver.cli.session import console, make_context, run_stage
from weaver.config.loading import load_section, load_seed
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.report.tables import console_table, format_number, format_percent, format_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.stages.pareto import Forecast


def partition(
    run_dir: RunDir,
    method: Annotated[
        str | None,
        typer.Option(
            help="weave (default), expertweaver, cmoe, dive, flap, wanda-sp, random or "
            "weight-kmeans."
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of FFN neurons that a token leaves out.")
    ] = None,
    num_experts: Annotated[
        int | None,
        typer.Option(
            "--num-experts",
            "--granularity",
            help="Slices of the FFN, shared ones counted in; of dive, its experts.",
        ),
    ] = None,
    expert_width_multiple: Annotated[
        int | None,
        typer.Option(help="Expert width is a multiple of this; the rest joins the shared expert."),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="Active neurons per layer: uniform, adaptive or fisher.")
    ] = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--one-shot",
            help="Profile each layer behind the converted ones before it; default: as the paper.",
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="Print predicted quality and speed of several numbers of experts; write nothing.",
        ),
    ] = False,
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
    if pareto:
        from weaver.stages.pareto import forecast_layouts

        rows = forecast_layouts(context, propagating(settings, router), calibration)
        _show_forecasts(settings, rows)
        return
    run_stage(context, "partition", lambda c: stage(c, propagating(settings, router), calibration))


def _show_forecasts(settings: PartitionConfig, forecasts: Sequence[Forecast]) -> None:
    from weaver.models.forecast import SPEED_TOKENS

    speeds = [f"speed-up at {n} token{'s' if n > 1 else ''}" for n in SPEED_TOKENS]
    headers = ("experts", "width", "active", "sparsity", "KL", "FFN FLOPs", *speeds, "optimal")
    rows = [
        (
            row.num_experts,
            row.expert_width,
            row.active_neurons,
            format_percent(row.sparsity),
            format_number(row.predicted_kl),
            format_percent(row.flops_ratio),
            *(format_ratio(speedup) for speedup in row.speedups),
            "yes" if row.optimal else "",
        )
        for row in forecasts
    ]
    title = f"{settings.method}, predicted: nats per token, FFN against the dense one"
    console.print(console_table(title, headers, rows))
    console.print("nothing was written; choose a row with --num-experts")


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("partition", rich_help_panel="Stages")(partition)
