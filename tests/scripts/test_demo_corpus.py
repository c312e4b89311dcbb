"""The demo corpus in the tree is what its README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import weaver
from weaver.data.sources import TEXT_DOCUMENT_CHARACTERS, Document, read_documents

CORPUS = Path(weaver.__file__).parent / "resources" / "corpus"
DOMAINS = {"fiction", "speeches", "code", "law", "dialogue", "technical"}
PARTS = {"calibration": "builtin:calibration", "held_out": "builtin:held-out"}


def by_domain(part: str) -> dict[str, list[Document]]:
    documents = read_documents(PARTS[part], None)
    return {
        name: [d for d in documents if d.group == name] for name in {d.group for d in documents}
    }


@pytest.mark.parametrize("part", PARTS)
def test_every_domain_has_documents_of_bounded_length(part: str) -> None:
    domains = by_domain(part)
    assert set(domains) == DOMAINS
    for documents in domains.values():
        assert len(documents) >= 10
        assert all(0 < len(d.text) <= TEXT_DOCUMENT_CHARACTERS for d in documents)
        assert len({d.text for d in documents}) == len(documents)


def test_sizes() -> None:
    sizes = {part: {f.stem: f.stat().st_size for f in (CORPUS / part).iterdir()} for part in PARTS}
    for name in DOMAINS:
        both = sizes["calibration"][name] + sizes["held_out"][name]
        assert 100_000 <= both <= 180_000
        assert 0.25 <= sizes["held_out"][name] / both <= 0.42
    assert 900_000 <= sum(sum(part.values()) for part in sizes.values()) <= 1_100_000


def test_no_paragraph_stands_in_both_parts() -> None:
    def paragraphs(part: str) -> set[str]:
        texts = (d.text for documents in by_domain(part).values() for d in documents)
        pieces = (p.strip() for text in texts for p in text.split("\n\n"))
        return {piece for piece in pieces if len(piece) > 200}

    calibration, held_out = paragraphs("calibration"), paragraphs("held_out")
    assert len(calibration) > 500
    assert len(held_out) > 250
    assert not calibration & held_out


def test_the_readme_names_source_version_and_licence_of_every_domain() -> None:
    readme = (CORPUS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| .+? \| (.+?) \| (.+?) \| .+? \| .+? \|$", readme, re.MULTILINE)
    table = {name: (source, licence) for name, source, licence in rows if name in DOMAINS}
    assert set(table) == DOMAINS
    for name, (source, licence) in table.items():
        assert re.search(r"\d+\.\d+\.\d+", source)
        assert licence in {"public domain", "CC0-1.0", "PSF-2.0", "BSD-3-Clause"}
        assert f"\n- {name}: {licence}; " in readme


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("PSF-2.0", "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2"),
        ("BSD-3-Clause", "Copyright (c) Gunther Cox and contributors"),
    ],
)
def test_licence_texts_that_must_travel_with_the_text(licence: str, words: str) -> None:
    text = (CORPUS / "licences" / f"{licence}.txt").read_text(encoding="utf-8")
    assert words in text
    assert "<year>" not in text
