"""``weaver push``."""

from __future__ import annotations

from typing import Annotated

import typer

from weaver.cli.session import console, quiet_libraries


def push(
    model: Annotated[str, typer.Argument(help="Run directory or model folder.")],
    repository: Annotated[str, typer.Argument(help="Name on the hub, OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="A repository that is made is private.")
    ] = False,
) -> None:
    """Upload a converted model or an export to the Hugging Face hub."""
    from weaver.stages.push import push as upload

    quiet_libraries()
    console.print(upload(model, repository, private=private), markup=False)
