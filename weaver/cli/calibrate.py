"""``weaver calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.stage_command import SharedOptions, StageCall, stage_command
from weaver.config.sections import DTYPE, CalibrateConfig

FLAGS = ("data", "tokens", "sequence_length", "groups")


@stage_command("calibrate", CalibrateConfig, FLAGS, reads_text=True)
def calibrate(
    settings: CalibrateConfig,
    options: SharedOptions,
    *,
    model: Annotated[
        str | None, typer.Argument(help="Folder, .gguf file or hub name; or in --config.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE)] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
) -> StageCall:
    """Run text through the dense model and keep what every method needs to know."""
    trusted = {"trust_remote_code": options.trust_remote_code or None}
    dense = options.model({"path": model, "revision": revision, "dtype": dtype, **trusted})
    from weaver.stages.calibrate import calibrate as stage

    return lambda context: stage(context, dense, settings)
