"""``weaver build-router``."""

from __future__ import annotations

from weaver.cli.stage_command import SharedOptions, StageCall, stage_command
from weaver.config.sections import RouterConfig


@stage_command(
    "build-router",
    RouterConfig,
    ("kind", "refit", "constants"),
    spelled={"kind": "--router"},
    key="router",
)
def build_router(settings: RouterConfig, _options: SharedOptions) -> StageCall:
    """Build a router for every layer that has routed experts, and make up for what is skipped.

    What a sequential partition was split behind is taken over, unless asked for otherwise.
    """
    from weaver.stages.build_router import build_routers

    return lambda context: build_routers(context, settings)
