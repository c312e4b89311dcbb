"""Tables that subcommands print: a finished stage, plan of a dry run, stages of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from weaver.report.tables import console_table, format_bytes, format_percent, format_seconds

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.rundir.inspection import StageState
    from weaver.stages.estimate import Estimate
    from weaver.stages.pipeline import PlannedStage


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
    console: Console, plan: Sequence[PlannedStage], needs: Estimate, lacking: Sequence[str]
) -> None:
    """Print the plan of a dry run, a row per stage, the estimate, and what is not free for it."""
    rows = [(stage.stage, stage.status, stage.note) for stage in plan]
    console.print(console_table("dry run", ("stage", "would", "note"), rows))
    console.print(
        f"estimate: {format_bytes(needs.memory)} of memory layer by layer, "
        f"{format_bytes(needs.eval_memory)} for eval and bench (both models); disk "
        f"{format_bytes(needs.profile_disk)} for profiles, {format_bytes(needs.model_disk)} "
        "for the model"
    )
    for line in lacking:
        console.print(f"[yellow]warning:[/yellow] {line}")


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
