"""Finished cells of a sweep as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from weaver.artifacts.compared_runs import ComparedRun
from weaver.artifacts.results import EvalResult, Record
from weaver.artifacts.summaries import read_summary
from weaver.rundir.measurements import read_eval
from weaver.rundir.stage_folders import STAGE_FOLDERS, finished_stage
from weaver.stages.compare import compare_runs
from weaver.stages.sweep import Cell

S = TypeVar("S", bound=Record)


@dataclass(frozen=True)
class Row:
    """A run.

    Args:
        cell: of the sweep.
        run_dir: its run directory.
        compared: with the dense model and with the reference of its sparsity.
        result: what ``eval`` measured.
    """

    cell: Cell
    run_dir: Path
    compared: ComparedRun
    result: EvalResult

    @property
    def name(self) -> str:
        """Name of the method: ``flap__refit`` is "flap, refit"."""
        return self.cell.method.replace("__", ", ").replace("_", " ")

    @property
    def sparsity(self) -> float:
        """FFN sparsity that was asked for."""
        return self.cell.config.partition.sparsity

    def summary(self, kind: type[S], stage: str) -> S:
        """The figures that a stage of the run left."""
        manifest, _ = finished_stage(self.run_dir / STAGE_FOLDERS[stage], stage)
        return read_summary(kind, manifest.summary)


@dataclass(frozen=True)
class Measured:
    """A finished sweep.

    Args:
        rows: its runs.
        page: the document that gets the table; pictures lie beside it.
        data_dir: folder of the data sets.
    """

    rows: Sequence[Row]
    page: Path
    data_dir: Path


def read_rows(cells: Sequence[Cell], folder: Path) -> list[Row]:
    """The rows of a sweep by seed and sparsity, each compared with the reference above it.

    The reference is the sweep's first method; ``compared`` pairs every row with the last one of it.
    """
    groups: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda each: (each.config.seed, each.config.partition.sparsity)):
        if not groups or cell.method == cells[0].method:
            groups.append([])
        groups[-1].append(cell)
    return [
        Row(cell, folder / cell.name, compared, read_eval(folder / cell.name))
        for group in groups
        for cell, compared in zip(
            group, compare_runs([folder / each.name for each in group]), strict=True
        )
    ]
