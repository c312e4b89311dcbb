"""Where text comes from: built-in corpus, local files and folders, or the hub.

A location is ``builtin:calibration``, ``builtin:held-out``, a file (.jsonl, .json, .parquet, .txt,
.raw) or folder of such files, or ``hf:NAME[,config][,split=train][,text=column]``. Documents keep
the task or domain they belong to as their group.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from weaver.artifacts.header import parse_json
from weaver.data.hub import hub_rows
from weaver.errors import WeaverError, require_extra

BUILTIN = {"calibration": "calibration", "held-out": "held_out"}
TEXT_DOCUMENT_CHARACTERS = 4000
# A hub data set is streamed; this many documents are plenty for statistics and fine-tuning.
HF_DOCUMENT_LIMIT = 20_000

GROUP_FIELDS = ("task", "domain", "group")
PAIR_FIELDS = (("prompt", "completion"), ("context", "continuation"))

_WEIGHT = re.compile(r"(?P<location>.+):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)")


@dataclass(frozen=True)
class DataSpec:
    """A location and its weight in the mixture."""

    location: str
    weight: float


@dataclass(frozen=True)
class Document:
    """One piece of text and the task or domain it belongs to.

    Args:
        text: of a conversation what is said in it, until a chat template makes it text.
        group: the task or domain.
        messages: of a conversation, with ``role`` and ``content``.
    """

    text: str
    group: str
    messages: tuple[Mapping[str, Any], ...] = ()


def parse_data_spec(text: str) -> DataSpec:
    """Split ``LOCATION[:WEIGHT]``; the weight is 1 when left out.

    Args:
        text: for example ``builtin:calibration``, ``a.jsonl:0.5`` or ``hf:allenai/c4,en:2``.

    Returns:
        The location and its weight; weights are relative to each other.

    Raises:
        WeaverError: the text is empty, or the weight is not a positive finite number.
    """
    match = _WEIGHT.fullmatch(text.strip())
    location = match["location"] if match else text.strip()
    weight = float(match["weight"]) if match else 1.0
    if not location:
        raise WeaverError(
            "an empty data location",
            why="data is LOCATION[:WEIGHT]",
            fix="--data builtin:calibration",
        )
    if weight <= 0 or not math.isfinite(weight):
        raise WeaverError(
            f"data {text!r} has weight {weight:g}",
            why="a mixture weight is a positive number",
            fix=f"--data {location}:0.5",
        )
    return DataSpec(location, weight)


def read_documents(location: str, data_dir: Path | None) -> list[Document]:
    """Read every document of a location, in a fixed order.

    Rows (.jsonl, .json, .parquet, hub) take their text from ``text``, from ``prompt`` and
    ``completion``, from ``context`` and ``continuation``, or from ``messages`` (a conversation),
    and their group from ``task``, ``domain`` or ``group``, else from the file's stem. A .txt file
    is cut at blank lines into documents of about 4,000 characters. A .raw file is one document in
    WikiText's raw layout. Rows without any visible character are skipped. Of a folder, the files
    directly inside are read by name. From the hub, at most ``HF_DOCUMENT_LIMIT`` documents come.

    Args:
        location: see above; a relative path is looked for in the current folder, then ``data_dir``.
        data_dir: a second place for relative paths.

    Raises:
        WeaverError: nothing is there, a file is empty, of an unknown kind or malformed, or a row
            has no text.
    """
    if location.startswith("hf:"):
        return _read_hub(location)
    path = _builtin_folder(location) if location.startswith("builtin:") else None
    path = path or find_path(location, data_dir)
    files = _data_files(path) if path.is_dir() else [path]
    return [document for file in files for document in _read_file(file)]


def split_text(text: str, limit: int) -> list[str]:
    """Cut text at blank lines into pieces of at most ``limit`` characters.

    Neighbouring paragraphs are joined as long as they fit; a paragraph that alone is too long is
    cut at its last white space within the limit, or at the limit when it has none.

    Raises:
        ValueError: ``limit`` is not positive.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} is not positive")
    pieces: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        for part in _cut_long(paragraph.strip("\n"), limit):
            if pieces and len(pieces[-1]) + 2 + len(part) <= limit:
                pieces[-1] += "\n\n" + part
            else:
                pieces.append(part)
    return pieces


def _cut_long(paragraph: str, limit: int) -> Iterator[str]:
    rest = paragraph.rstrip()
    while len(rest) > limit:
        cut = max(rest.rfind(white, 1, limit + 1) for white in (" ", "\n", "\t"))
        cut = limit if cut < 1 else cut
        if rest[:cut].strip():
            yield rest[:cut].rstrip()
        rest = rest[cut:].lstrip()
    if rest.strip():
        yield rest


def _builtin_folder(location: str) -> Path:
    name = location.removeprefix("builtin:")
    if name not in BUILTIN:
        raise WeaverError(
            f"{location}: no such built-in data",
            why=f"built in are {', '.join(f'builtin:{known}' for known in BUILTIN)}",
            fix="--data builtin:calibration",
        )
    return Path(__file__).parents[1] / "resources" / "corpus" / BUILTIN[name]


def find_path(location: str, data_dir: Path | None) -> Path:
    """The file or folder of a location: as it stands, else below ``data_dir``.

    Raises:
        WeaverError: it is in neither place.
    """
    candidates = [Path(location)]
    if data_dir is not None and not candidates[0].is_absolute():
        candidates.append(data_dir / location)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise WeaverError(
        f"{location}: no such data",
        why=f"looked for {', '.join(str(path) for path in candidates)}",
        fix="--data-dir DIR or WEAVER_DATA=DIR names the folder that relative paths start from; "
        "a data set of the hub is hf:NAME; builtin:calibration is always there",
    )


def _data_files(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in _READERS]
    if not files:
        raise WeaverError(
            f"{folder}: holds no data file",
            why=f"data files end in {', '.join(_READERS)}, directly inside the folder",
            fix="name a folder that holds such files, or one file",
        )
    return sorted(files)


def _read_file(path: Path) -> list[Document]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise WeaverError(
            f"{path}: unknown kind of data file",
            why=f"weaver reads {', '.join(_READERS)}",
            fix="rename or convert the file, for example to .jsonl with a text field",
        )
    try:
        documents = [document for document in reader(path) if document.text.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _malformed(str(path), error) from error
    if not documents:
        raise WeaverError(
            f"{path}: holds no text",
            why=f"the file has {path.stat().st_size} bytes and no row with text",
            fix="give a file with text, or leave it out",
        )
    return documents


def _read_text(path: Path) -> Iterator[Document]:
    for piece in split_text(path.read_text(encoding="utf-8-sig"), TEXT_DOCUMENT_CHARACTERS):
        yield Document(piece, path.stem)


def _read_raw(path: Path) -> Iterator[Document]:
    # The rows of WikiText's raw data set keep their line end, and a blank row is "". Perplexities
    # in the literature are over these rows joined with "\n\n"; other joins give other numbers.
    rows = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    yield Document("\n\n".join(row if row.strip() else "" for row in rows), path.stem)


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield _document(_parse_json(line, where), path.stem, where)


def _read_json(path: Path) -> Iterator[Document]:
    rows = _parse_json(path.read_text(encoding="utf-8-sig"), str(path))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield _document(row, path.stem, f"{path}: row {number}")


def _read_parquet(path: Path) -> Iterator[Document]:
    require_extra("pyarrow", "data", str(path))
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _document(row, path.stem, f"{path}: row {number}")
    except ArrowException as error:
        raise _malformed(str(path), error) from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".raw": _read_raw,
}


def _parse_json(text: str, where: str) -> Any:
    try:
        return parse_json(text, unique=False)
    except ValueError as error:
        line = ""
        if isinstance(error, json.JSONDecodeError) and "\n" in text.strip():
            line = f":{error.lineno}"
        raise _malformed(f"{where}{line}", error) from error


def _malformed(where: str, error: Exception) -> WeaverError:
    return WeaverError(
        f"{where}: cannot be read",
        why=f"{type(error).__name__}: {error}",
        fix="mend or replace the file; text is UTF-8, .jsonl has one JSON object a line",
    )


def _document(row: Any, default_group: str, where: str) -> Document:
    if not isinstance(row, Mapping):
        raise WeaverError(
            f"{where}: holds a {type(row).__name__}, not an object",
            why="a row is an object with a text field",
            fix='write rows such as {"text": "..."}',
        )
    messages = _messages(row.get("messages"))
    text = "\n".join(each["content"] for each in messages) if messages else _row_text(row)
    if text is None:
        raise WeaverError(
            f"{where}: has no text; its keys are {', '.join(map(str, row)) or 'none'}",
            why="text is taken from text, from prompt and completion, from context and "
            "continuation, or from messages with a role and a content",
            fix="rename the field that holds the text to text",
        )
    labels = (row.get(field) for field in GROUP_FIELDS)
    group = next((str(label) for label in labels if isinstance(label, str | int)), default_group)
    return Document(text, group, messages)


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The messages of a conversation; none where the row holds something else."""
    if not isinstance(value, list):
        return ()
    whole = all(
        isinstance(each, Mapping) and all(isinstance(each.get(k), str) for k in ("role", "content"))
        for each in value
    )
    return tuple(value) if whole else ()


def _row_text(row: Mapping[str, Any]) -> str | None:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    for first, second in PAIR_FIELDS:
        head, tail = row.get(first), row.get(second)
        if isinstance(head, str) and isinstance(tail, str):
            separated = not head or not tail or head[-1].isspace() or tail[0].isspace()
            return head + tail if separated else f"{head} {tail}"
    return None


def _read_hub(location: str) -> list[Document]:
    group, rows = hub_rows(location)
    documents = [
        _document(row, group, f"{location}: row {number}")
        for number, row in enumerate(islice(rows, HF_DOCUMENT_LIMIT), start=1)
    ]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise WeaverError(
            f"{location}: holds no text",
            why="every row of the split is blank, or it has no row",
            fix="name another split: hf:NAME,split=validation",
        )
    return documents
