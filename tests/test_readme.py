"""README.md keeps what it promises: its tables are the registries, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from weaver.cli.app import app
from weaver.export.registry import NAMES
from weaver.methods.registry import METHODS
from weaver.methods.routers import ROUTERS
from weaver.models.families import ALL_FAMILIES
from weaver.training.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every ``weaver`` command in a bash block of the README and of CONTRIBUTING.md."""
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("weaver ") and line != "weaver --help"]


def table(first_header: str) -> list[list[str]]:
    """Cells of the README table whose first column has this header."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def test_the_table_of_methods_is_the_registry() -> None:
    rows = {row[0]: row for row in table("method")}
    assert list(rows) == list(METHODS)
    for name, spec in METHODS.items():
        _, summary, source, experts, router, sequential = rows[name]
        assert (summary, source) == (spec.summary, spec.source)
        assert experts == ("static" if spec.is_static else str(spec.num_experts))
        assert router == (spec.router or "none")
        assert sequential == ("yes" if spec.sequential else "no")


def test_the_table_of_routers_is_the_registry() -> None:
    assert [row[:3] for row in table("router")] == [
        [spec.name, spec.kind, spec.summary] for spec in ROUTERS.values()
    ]


def test_the_table_of_presets_is_the_registry() -> None:
    assert table("preset") == [[p.name, p.summary, p.source] for p in PRESETS.values()]


def test_the_table_of_families_is_the_registry() -> None:
    assert [row[:2] for row in table("`model_type`")] == [
        [family.model_type, family.causal_lm] for family in ALL_FAMILIES.values()
    ]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    # Parses flags and values, and runs nothing; an unknown flag or a missing one raises.
    command.make_context(name, list(arguments))


def test_there_are_commands_of_every_stage() -> None:
    named = {line.split()[1] for line in commands()}
    assert named >= {"calibrate", "partition", "build-router", "assemble", "eval", "bench", "run"}


def test_local_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / link).exists(), link


def test_the_table_of_export_targets_is_the_registry() -> None:
    assert [row[0] for row in table("`--to`")] == list(NAMES)
