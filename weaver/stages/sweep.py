"""``sweep``: conversions for every combination of some settings, on calibrations that they share.

A cell is a run directory, worked on by a process of its own: one that dies, for want of memory say,
takes no other along, and peak memory is its own. What is finished is skipped by the rules of every
run, so that the same command goes on where the last one stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from weaver.artifacts.store import canonical_json, text_digest, write_text
from weaver.config.loading import RunConfig
from weaver.config.sweeping import SweepFile, SweepMethod
from weaver.errors import WeaverError
from weaver.methods.registry import get_method
from weaver.models.device import resolve_device
from weaver.report.page import report_page
from weaver.report.runs_table import NOTE, runs_table
from weaver.report.tables import format_number, format_seconds, markdown_table
from weaver.rundir.lock import locked
from weaver.rundir.measurements import read_eval
from weaver.rundir.stage_run import StageContext
from weaver.stages.compare import compare_runs
from weaver.stages.pipeline import run_pipeline, stage_calls
from weaver.stages.report import read_runs

COMPARISON, REPORT, LOGS = "comparison.md", "report.html", "logs"


@dataclass(frozen=True)
class Cell:
    """A conversion of a sweep.

    Args:
        name: of its run directory.
        method: name of its method in the sweep.
        config: of its run.
        calibration: name of the run directory that holds its calibration.
    """

    name: str
    method: str
    config: RunConfig
    calibration: str


@dataclass(frozen=True)
class Failure:
    """A cell that failed, and the error that ended it."""

    cell: str
    error: str


def cells_of(file: SweepFile) -> list[Cell]:
    """The cells of a sweep, seed by seed, each with the settings of its method over the file's.

    Raises:
        WeaverError: no such method, a value that is not allowed, or two cells of one name.
    """
    sweep, cells = file.sweep, []
    plain = canonical_json(file.run_config({}, 0).calibrate.model_dump(mode="json"))
    for seed in sweep.seeds:
        for each in sweep.methods:
            method = SweepMethod(name=each) if isinstance(each, str) else each
            given: dict[str, dict[str, Any]] = {
                key: dict(section) for key, section in method.sections.items()
            }
            partition = {"method": method.name, **given.get("partition", {})}
            static = get_method(partition["method"]).num_experts is None
            own_sparsity = (partition["sparsity"],) if "sparsity" in partition else None
            for sparsity in own_sparsity or sweep.sparsities:
                for slices in (None,) if static else sweep.num_experts:
                    chosen = {**partition, "sparsity": sparsity}
                    if slices is not None:
                        chosen["num_experts"] = slices
                    config = file.run_config({**given, "partition": chosen}, seed)
                    text = canonical_json(config.calibrate.model_dump(mode="json"))
                    own = "" if text == plain else f"-{text_digest(text)[:8]}"
                    name = f"{method.name}-{sparsity:g}" + (f"-{slices}slices" if slices else "")
                    name += f"-seed{seed}" if len(sweep.seeds) > 1 else ""
                    cells.append(Cell(name, method.name, config, f"calibration-seed{seed}{own}"))
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WeaverError(
            f"two cells are called {', '.join(twice)}",
            why="a cell's run directory is named after method, sparsity, slices and seed",
            fix="give each method of the sweep a name of its own",
        )
    return cells


def run_sweep(
    file: SweepFile, folder: Path, *, data_dir: Path | None, say: Callable[[str], None]
) -> list[Failure]:
    """Run every cell, then write ``comparison.md`` and ``report.html`` of those that finished.

    Args:
        file: the sweep.
        folder: gets a run directory per cell and calibration, and their logs.
        data_dir: where data files are looked for after the current folder.
        say: prints a line.

    Returns:
        The cells that failed.

    Raises:
        WeaverError: another process works in the folder; a cell's settings are not allowed.
    """
    cells = cells_of(file)
    calibrations = {cell.calibration: cell for cell in reversed(cells)}
    stages = ["partition", "build-router", "assemble", "finetune", "eval"]
    stages += ["bench"] if file.sweep.bench else []
    failures: list[Failure] = []
    with locked(folder):
        say(f"{len(cells)} cells on {len(calibrations)} calibrations")
        broken: dict[str, str] = {}
        for number, cell in enumerate(cells, start=1):
            started = time.monotonic()
            if cell.calibration not in broken and cell is calibrations[cell.calibration]:
                error = _in_process(cell, folder, ("calibrate",), data_dir)
                broken |= {} if error is None else {cell.calibration: error}
            error = broken.get(cell.calibration) or _in_process(cell, folder, stages, data_dir)
            took = format_seconds(time.monotonic() - started)
            if error is None:
                kl = format_number(read_eval(folder / cell.name).kl)
                say(f"{number}/{len(cells)} {cell.name}: KL {kl}, {took}")
            else:
                failures.append(Failure(cell.name, error))
                say(f"{number}/{len(cells)} {cell.name}: failed after {took}: {error}")
        failed = {each.cell for each in failures}
        done = [folder / cell.name for cell in cells if cell.name not in failed]
        if done:
            _write_results(folder, done, failures)
    return failures


def _write_results(folder: Path, done: Sequence[Path], failures: Sequence[Failure]) -> None:
    headers, rows = runs_table(compare_runs(done))
    lines = [f"- {each.cell}: {each.error}" for each in failures]
    text = "\n".join(["Failed:", "", *lines, ""]) if failures else ""
    table = markdown_table(["", *(Path(name).name for name in headers[1:])], rows)
    write_text(folder / COMPARISON, f"{table}\n{NOTE}\n\n{text}")
    write_text(folder / REPORT, report_page(read_runs(done)))


def _in_process(
    cell: Cell, folder: Path, stages: Sequence[str], data_dir: Path | None
) -> str | None:
    """Run stages of a cell in a process of its own; the error that ended them, or None."""
    # Forks of a server that has imported torch, and computed nothing, start in no time.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["weaver.stages.pipeline"])
    ours, theirs = processes.Pipe(duplex=False)
    log = folder / LOGS / f"{cell.name}.log"
    log.parent.mkdir(exist_ok=True)
    arguments = (cell, folder, stages, data_dir, log, torch.get_num_threads(), theirs)
    process = processes.Process(target=_work, args=arguments)
    process.start()
    theirs.close()
    try:
        said: str | None = ours.recv()
    except EOFError:
        process.join()
        return f"the process ended with exit code {process.exitcode}, as if killed; log {log}"
    finally:
        if sys.exc_info()[0] is KeyboardInterrupt:
            process.terminate()
        process.join()
    return said


def _work(
    cell: Cell,
    folder: Path,
    stages: Sequence[str],
    data_dir: Path | None,
    log: Path,
    threads: int,
    answer: Connection[Any, Any],
) -> None:
    """Run the stages and send the error, or None; whatever is printed goes to the log."""
    with log.open("a", encoding="utf-8") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    threading.Thread(target=_end_with_reader, args=(answer,), daemon=True).start()
    torch.set_num_threads(threads)
    shared = folder / cell.calibration
    calls = stage_calls(cell.config)
    if "calibrate" not in stages:
        calls = stage_calls(cell.config, shared / "calibrate")
    try:
        context = StageContext(
            folder / cell.name if "calibrate" not in stages else shared,
            seed=cell.config.seed,
            data_dir=data_dir,
            device=resolve_device(cell.config.device),
            say=lambda line: print(line, flush=True),
        )
        run_pipeline(
            context,
            {stage: call for stage, call in calls.items() if stage in stages},
            lambda stage, manifest: print(
                f"{stage}: {format_seconds(manifest.seconds)}", flush=True
            ),
        )
    except WeaverError as error:
        print(f"error: {error.what}\n  why: {error.why}\n  fix: {error.fix}", flush=True)
        answer.send(f"{error.what} ({error.why}; fix: {error.fix})")
    # A cell must not end the others, whatever it trips over.
    except Exception as error:
        traceback.print_exc()
        answer.send(f"{type(error).__name__}: {error}; log {log}")
    else:
        answer.send(None)


def _end_with_reader(answer: Connection[Any, Any]) -> None:
    """End this process when nobody is left to read its answer, since the sweep was killed.

    Otherwise the cell would hold its run directory against the sweep that is started next.
    """
    broken = select.poll()
    broken.register(answer.fileno(), select.POLLERR)
    broken.poll()
    os._exit(1)
