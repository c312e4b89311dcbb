"""``weaver verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.options import Data, DataDir
from weaver.cli.session import console, make_context
from weaver.cli.show import show_verification
from weaver.config.loading import parse_config
from weaver.config.sections import VerifyConfig
from weaver.errors import WeaverError


def verify(
    export: Annotated[Path, typer.Argument(help="A folder that weaver export wrote.")],
    against: Annotated[
        Path, typer.Option("--against", help="The run directory that it was made from.")
    ],
    data: Data = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to compare on.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens that both write on from a prompt.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Fail above this KL, nats per token.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the computation: float32, bfloat16, float16, auto.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the result to this file.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Compare an export with its model, in a process that cannot import weaver."""
    flags = {
        "data": tuple(data) if data else None,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "new_tokens": new_tokens,
        "max_kl": max_kl,
        "dtype": dtype,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    settings = parse_config(VerifyConfig, given, source="verify flags")
    from weaver.artifacts.store import write_json
    from weaver.stages.verify import verify as compare

    context = make_context(against, seed=0, force=False, dry_run=False, data_dir=data_dir)
    result = compare(context, export, settings)
    show_verification(console, str(export), result.model_dump())
    if json_file is not None:
        write_json(json_file, result.model_dump(mode="json"))
    if result.kl is not None and result.kl > settings.max_kl:
        raise WeaverError(
            f"{export}: KL {result.kl:.3g} to the model it was made from, above {settings.max_kl}",
            why="an exact export computes the same, up to rounding; an approximated one does not",
            fix="--max-kl for an approximated export; else weaver export with --force",
        )


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("verify", rich_help_panel="Converted models")(verify)
