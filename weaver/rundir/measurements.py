"""Results of ``eval`` and ``bench`` in a run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from weaver.artifacts.bench_results import BenchResult
from weaver.artifacts.results import EvalResult
from weaver.artifacts.store import read_json
from weaver.errors import WeaverError
from weaver.rundir.stage_folders import STAGE_FOLDERS, stage_command

RESULTS = "results.json"
T = TypeVar("T")


def read_eval(run_dir: Path) -> EvalResult:
    """``eval/results.json``.

    Raises:
        WeaverError: it is missing, or not what ``eval`` writes.
    """
    return _read(run_dir, "eval", EvalResult.model_validate)


def read_bench(run_dir: Path) -> BenchResult:
    """``bench/results.json``.

    Raises:
        WeaverError: it is missing, or not what ``bench`` writes.
    """
    return _read(run_dir, "bench", BenchResult.from_flat_rows)


def _read(run_dir: Path, stage: str, build: Callable[[Any], T]) -> T:
    path, command = run_dir / STAGE_FOLDERS[stage] / RESULTS, stage_command(stage, run_dir)
    values = read_json(path, rebuild=command)
    try:
        return build(values)
    # pydantic's errors are ValueErrors; the others are of values that are no rows.
    except (ValueError, TypeError, AttributeError) as error:
        raise WeaverError(
            f"{path}: not what {stage} writes",
            why=str(error).splitlines()[0],
            fix=f"{command} --force",
        ) from error
