"""The documents keep what they promise: tables are the registries, commands and links exist."""

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
MANUALS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *MANUALS]
MAX_README_LINES = 200


def name(document: Path) -> str:
    """Path of a document as test ids show it."""
    return document.relative_to(ROOT).as_posix()


def commands_of(text: str) -> list[str]:
    """Every ``weaver`` command in a text's bash blocks, also behind ``python -m`` or a launcher."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|\s-m )weaver (?!--)\S.*", line.strip()) for line in lines]
    return [match[0].strip().removeprefix("-m ") for match in found if match]


COMMANDS = [
    pytest.param(line, id=f"{name(document)}: {line}")
    for document in DOCUMENTS
    for line in dict.fromkeys(commands_of(document.read_text()))
]


def table(document: str, first_header: str) -> list[list[str]]:
    """Cells of the one table of a document whose first column has this header."""
    lines = (ROOT / document).read_text().splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first_header} ")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def anchors(document: Path) -> set[str]:
    """What a link to a heading of a document may say behind the #, as GitHub forms it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


def test_the_readme_links_to_every_document() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [name(path) for path in DOCUMENTS[1:] if f"]({name(path)})" not in readme] == []


def test_the_table_of_methods_is_the_registry() -> None:
    rows = {row[0]: row for row in table("README.md", "method")}
    assert list(rows) == list(METHODS)
    for method, spec in METHODS.items():
        _, summary, source, experts, router, sequential = rows[method]
        assert (summary, source) == (spec.summary, spec.source)
        assert experts == ("static" if spec.is_static else str(spec.num_experts))
        assert router == (spec.router or "none")
        assert sequential == ("yes" if spec.sequential else "no")


def test_the_table_of_routers_is_the_registry() -> None:
    assert [row[:3] for row in table("docs/methods.md", "router")] == [
        [spec.name, spec.kind, spec.summary] for spec in ROUTERS.values()
    ]


def test_the_table_of_presets_is_the_registry() -> None:
    rows = [[p.name, p.summary, p.source] for p in PRESETS.values()]
    assert table("docs/finetuning.md", "preset") == rows


def test_the_table_of_families_is_the_registry() -> None:
    assert [row[:2] for row in table("docs/families.md", "`model_type`")] == [
        [family.model_type, family.causal_lm] for family in ALL_FAMILIES.values()
    ]


@pytest.mark.parametrize("document", ["README.md", "docs/export.md"])
def test_the_table_of_export_targets_is_the_registry(document: str) -> None:
    assert [row[0] for row in table(document, "`--to`")] == list(NAMES)


def test_the_headline_is_what_was_measured() -> None:
    shown = table("README.md", "converted by")
    assert shown == table("docs/headline.md", "converted by")
    assert {row[0] for row in shown} > {"weave", "weave, stock, 64 experts", "flap, refit", "flap"}
    results = (
        (ROOT / "docs" / "results.md").read_text().split("\n## Multi-task")[1].split("\n## ")[0]
    )
    measured = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in results.splitlines()
        if line.startswith("| ")
    ]
    for method, _, flops, kl, perplexity, *_ in shown:
        assert any(
            row[0] == method
            and row[2].startswith(f"{kl} ")
            and float(row[5]) == float(perplexity)
            and row[7] == flops
            for row in measured
        ), method


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    _, command_name, *arguments = shlex.split(line, comments=True)
    group: Any = typer.main.get_command(app)
    command = group.commands[command_name]
    # Parses flags and values, and runs nothing; an unknown flag or a missing one raises.
    command.make_context(command_name, list(arguments))


def test_commands_are_found_in_blocks() -> None:
    text = (
        "```bash\nmake demo\nweaver --help\nweaver run a.yaml \\\n  --run-dir b  # all\n```\n"
        "```text\nweaver eval\n```\n```bash\ntorchrun -m weaver finetune --steps 2\n```\n"
    )
    assert [shlex.split(line, comments=True) for line in commands_of(text)] == [
        ["weaver", "run", "a.yaml", "--run-dir", "b"],
        ["weaver", "finetune", "--steps", "2"],
    ]


def test_every_command_is_in_the_documents() -> None:
    group: Any = typer.main.get_command(app)
    named = {line.split()[1] for path in DOCUMENTS for line in commands_of(path.read_text())}
    assert named == set(group.commands)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_local_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
