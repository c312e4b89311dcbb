"""``weaver pareto``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weaver.cli.options import Calibration
from weaver.cli.session import console
from weaver.cli.stage_command import SharedOptions, section_command
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.report.tables import console_table, format_number, format_percent, format_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from weaver.conversion.pareto import Forecast


@section_command(
    "partition",
    PartitionConfig,
    ("method", "sparsity", "num_experts", "expert_width_multiple"),
    shared=("run_dir", "config", "overrides", "seed", "trust_remote_code"),
)
def pareto(
    settings: PartitionConfig, options: SharedOptions, *, calibration: Calibration = None
) -> None:
    """Predict quality and speed of several numbers of experts; write nothing."""
    from weaver.conversion.pareto import forecast_layouts

    router = options.section(RouterConfig, "router")
    _show(settings, forecast_layouts(options.context(), settings, router, calibration))


def _show(settings: PartitionConfig, forecasts: Sequence[Forecast]) -> None:
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
