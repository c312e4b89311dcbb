"""``weaver inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from weaver.cli.session import console
from weaver.cli.show import show_states
from weaver.cli.show_two_level import show_levels


def inspect(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute every file's digest again.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the summary of every stage.")
    ] = False,
) -> None:
    """Show what a run directory holds, with digests, times and memory."""
    from weaver.rundir.inspection import inspect_run

    states = inspect_run(run_dir, verify=verify)
    if as_json:
        print(json.dumps([state.row() for state in states], indent=2))
    else:
        show_states(console, states)
        show_levels(console, states)
    if any(state.state == "damaged" for state in states):
        raise typer.Exit(1)
