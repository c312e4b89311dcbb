"""Tables that subcommands print: a finished stage, plan of a dry run, stages of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from weaver.report.tables import console_table, format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.rundir.inspection import StageState
    from weaver.stages.estimate import Needs
    from weaver.stages.pipeline import PlannedStage
    from weaver.stages.stage_times import ExpectedTime


def show_manifest(console: Console, stage: str, manifest: StageManifest, folder: Path) -> None:
    """One line about a finished stage, and the table of its summary."""
    # Not at the top: the help would wait for the types of the summaries.
    from weaver.cli.show_summaries import show_summary

    console.print(
        f"[green]{stage}[/green] {folder}  digest {manifest.digest[:12]}  "
        f"{format_seconds(manifest.seconds)}, peak {format_bytes(manifest.peak_memory_bytes)}"
    )
    show_summary(console, stage, manifest.summary)


def show_plan(
    console: Console,
    plan: Sequence[PlannedStage],
    needs: Mapping[str, Needs],
    times: Mapping[str, ExpectedTime],
    lacking: Sequence[str],
) -> None:
    """Print the plan of a dry run, a row per stage with its estimates, and what is not free."""
    rows = [
        (
            *(stage.stage, stage.status, format_bytes(needs[stage.stage].memory)),
            format_bytes(needs[stage.stage].disk) if needs[stage.stage].disk else "-",
            *_expected(times.get(stage.stage)),
            stage.note,
        )
        for stage in plan
    ]
    headers = ("stage", "would", "peak memory", "disk", "time", "time scaled from", "note")
    console.print(console_table("dry run, with estimates", headers, rows))
    for line in lacking:
        console.print(f"[yellow]warning:[/yellow] {line}")


def _expected(time: ExpectedTime | None) -> tuple[str, str]:
    return (
        ("unknown", "-") if time is None else (format_seconds(time.seconds), Path(time.source).name)
    )


def show_states(console: Console, states: Sequence[StageState]) -> None:
    """The stages of a run directory."""
    rows = []
    for state in states:
        manifest = state.manifest
        rows.append(
            (
                state.stage,
                state.state,
                manifest.digest[:12] if manifest else "-",
                format_bytes(state.size),
                format_seconds(manifest.seconds) if manifest else "-",
                format_bytes(manifest.peak_memory_bytes) if manifest else "-",
                manifest.finished_at if manifest else state.note,
            )
        )
    headers = ("stage", "state", "digest", "size", "time", "peak memory", "finished")
    console.print(console_table(str(states[0].folder.parent), headers, rows))


def show_results(console: Console, run_dir: Path, *, finetuned: bool) -> None:
    """Dense against converted, from the results of eval and bench; and where the model lies."""
    from weaver.report.comparison import HEADERS, comparison_rows
    from weaver.rundir.measurements import read_bench, read_eval

    quality = read_eval(run_dir)
    title = f"dense against converted, FFN sparsity {format_percent(quality.ffn_sparsity)}"
    console.print(console_table(title, HEADERS, comparison_rows(quality, read_bench(run_dir))))
    console.print(f"model: {run_dir / ('finetune/model' if finetuned else 'model')}")
