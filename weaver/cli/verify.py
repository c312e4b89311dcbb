"""``weaver verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.session import console
from weaver.cli.stage_command import SharedOptions, section_command
from weaver.config.sections import VerifyConfig
from weaver.errors import WeaverError

FLAGS = ("data", "tokens", "sequence_length", "new_tokens", "max_kl", "runtime", "dtype")


@section_command("verify", VerifyConfig, FLAGS, shared=("data_dir", "trust_remote_code"))
def verify(
    settings: VerifyConfig,
    options: SharedOptions,
    *,
    export: Annotated[Path, typer.Argument(help="A folder that weaver export wrote.")],
    against: Annotated[
        Path, typer.Option("--against", help="The run directory that it was made from.")
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
) -> None:
    """Compare an export with its model, in the runtime that it is for."""
    from weaver.artifacts.store import write_json
    from weaver.cli.show_summaries import show_verification
    from weaver.stages.verify import verify as compare

    result = compare(options.context(against), export, settings)
    show_verification(console, str(export), result)
    if json_file is not None:
        write_json(json_file, result.model_dump(mode="json"))
    if result.kl > settings.max_kl:
        raise WeaverError(
            f"{export}: KL {result.kl:.3g} to the model it was made from, above {settings.max_kl}",
            why="an exact export computes the same, up to rounding; an approximated one does not",
            fix="--max-kl for an approximated export; else weaver export with --force",
        )
