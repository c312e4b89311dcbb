"""A sweep: one run file, and the lists of values that its cells combine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from weaver.config.loading import RunConfig, merge_sections, parse_config, read_yaml
from weaver.config.sections import Section
from weaver.errors import WeaverError

Share = Annotated[float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
# Sections that a method of a sweep may change.
Varied = Literal["calibrate", "partition", "router", "assemble", "finetune"]


class SweepMethod(Section):
    """A method with settings of its own; ``name`` stands in the names of its cells.

    Its own ``partition.sparsity`` takes the place of the sweep's sparsities.
    """

    name: Name
    sections: dict[Varied, dict[str, Any]] = Field(default_factory=dict)


class SweepConfig(Section):
    """Lists of values: a cell for each combination.

    Args:
        methods: names of partition methods, or a name with sections of settings.
        sparsities: shares of FFN neurons that a token skips.
        num_experts: numbers of slices, null for the method's own; a static method has none.
        seeds: of calibration and conversion.
        bench: whether speed is measured too.
    """

    methods: tuple[Name | SweepMethod, ...] = Field(("weave",), min_length=1)
    sparsities: tuple[Share, ...] = Field((0.25, 0.5), min_length=1)
    num_experts: tuple[Annotated[int, Field(gt=0)] | None, ...] = Field((None,), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    bench: bool = True


class SweepFile(Section):
    """A run file with its section ``sweep`` taken out, and that section."""

    values: dict[str, Any]
    sweep: SweepConfig

    def run_config(self, sections: dict[str, dict[str, Any]], seed: int) -> RunConfig:
        """The configuration of a cell: the file's, under values of its own."""
        merged = merge_sections(self.values, sections)
        return parse_config(RunConfig, {**merged, "seed": seed}, source="sweep")


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepFile:
    """Read a run file with a section ``sweep``.

    Args:
        path: a YAML file.
        overrides: ``section.key=value`` texts over it.

    Raises:
        WeaverError: the file cannot be read, has no such section, or a value is not allowed.
    """
    values = read_yaml(path, overrides)
    if not isinstance(values.get("sweep"), dict):
        raise WeaverError(
            f"{path}: no section sweep",
            why="it lists methods, sparsities, num_experts and seeds",
            fix="add one, or use weaver run for a single conversion",
        )
    sweep = parse_config(SweepConfig, values.pop("sweep"), source=f"{path}, sweep")
    found = SweepFile(values=values, sweep=sweep)
    found.run_config({}, 0)
    return found
