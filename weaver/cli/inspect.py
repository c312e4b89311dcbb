"""``weaver inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
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
    layer: Annotated[
        int | None, typer.Option(help="Show one layer among the others, from 0.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the summary of every stage.")
    ] = False,
) -> None:
    """Show what a run directory holds, with digests, times and memory."""
    from weaver.rundir.inspection import inspect_run

    if layer is not None:
        _show_layer(run_dir, layer, as_json=as_json)
        return
    states = inspect_run(run_dir, verify=verify)
    if as_json:
        print(json.dumps([state.row() for state in states], indent=2))
    else:
        show_states(console, states)
        show_levels(console, states)
    if any(state.state == "damaged" for state in states):
        raise typer.Exit(1)


def _show_layer(run_dir: Path, layer: int, *, as_json: bool) -> None:
    from weaver.report.layer_view import layer_rows, spread_rows
    from weaver.report.tables import console_table
    from weaver.stages.inspect_layer import inspect_layer

    found = inspect_layer(run_dir, layer)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    console.print(f"layer {layer}: {found.split}", markup=False)
    headers = ("measure", "value", "rank", "all layers, from input to output")
    console.print(console_table("among the layers", headers, layer_rows(layer, found.facts)))
    console.print(
        console_table("inside the layer", ("values", "range", ""), spread_rows(found.spreads))
    )
