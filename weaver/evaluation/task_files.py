"""Task files: which format a file has, and its items as pairs of context and continuation.

| kind              | file                | an item                                              |
|-------------------|---------------------|------------------------------------------------------|
| multiple-choice   | jsonl               | ``{"query", "choices", "gold"}``                     |
| schema            | jsonl               | ``{"context_options", "continuation", "gold"}``      |
| completion        | jsonl               | ``{"context", "continuation"}``                      |
| multiple-choice   | .txt or .txt.bz2    | HellaSwag: 6 lines: context, gold index, 4 endings   |
"""

from __future__ import annotations

import bz2
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from weaver.artifacts.header import parse_json
from weaver.errors import WeaverError

TaskKind = Literal["multiple-choice", "schema", "completion"]

FORMATS: dict[frozenset[str], TaskKind] = {
    frozenset({"query", "choices", "gold"}): "multiple-choice",
    frozenset({"context_options", "continuation", "gold"}): "schema",
    frozenset({"context", "continuation"}): "completion",
}
HELLASWAG_ENDINGS = 4
TEXT_SUFFIXES = (".txt", ".txt.bz2")
JSON_SUFFIXES = (".jsonl", ".jsonl.bz2")


@dataclass(frozen=True)
class TaskItem:
    """One question.

    Args:
        contexts: what each candidate continues; equal strings for multiple choice.
        continuations: what is scored; equal strings for a schema task.
        gold: index of the right candidate.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskFile:
    """The items of one file, all of one kind."""

    name: str
    kind: TaskKind
    items: tuple[TaskItem, ...]


def resolve_task_path(name: str, data_dir: Path | None) -> Path:
    """The file of a task: relative to the working directory, then to the data folder.

    Raises:
        WeaverError: neither holds such a file.
    """
    candidates = [Path(name), *([data_dir / name] if data_dir is not None else [])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise WeaverError(
        f"task {name!r}: no such file",
        why=f"looked for {', '.join(str(candidate) for candidate in candidates)}",
        fix="give the folder with --data-dir DIR (or WEAVER_DATA=DIR), "
        "or use harness:NAME for a task of lm-evaluation-harness",
    )


def read_task(path: Path, limit: int | None = None) -> TaskFile:
    """The first ``limit`` items of a task file.

    Args:
        path: a file in one of the formats of the module's table.
        limit: number of items; all when None.
    Raises:
        ValueError: ``limit`` is not positive.
        WeaverError: the file is missing, empty or damaged, or a row has no known format.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} is not positive")
    name, suffix = _split_name(path)
    if not path.is_file():
        raise _problem(str(path), "no such file", "a task is a local file", f"--data-dir {_HINT}")
    read = _read_hellaswag if suffix in TEXT_SUFFIXES else _read_rows
    try:
        with _open(path) as handle:
            pairs = list(islice(read(handle, path), limit))
    except (UnicodeDecodeError, EOFError, OSError) as error:
        why = f"not readable as UTF-8 text: {error}"
        raise _problem(str(path), "cannot be read", why, "fetch the file again") from error
    if not pairs:
        raise _problem(str(path), "holds no item", "an empty task has no score", "fetch it again")
    return TaskFile(name, pairs[0][0], tuple(item for _, item in pairs))


def _read_rows(handle: TextIO, path: Path) -> Iterator[tuple[TaskKind, TaskItem]]:
    """Items of a jsonl file; the first row decides the kind of all."""
    expected: TaskKind | None = None
    for number, line in enumerate(handle, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse_row(line, where)
        kind = _kind_of(row, where)
        expected = expected or kind
        if kind != expected:
            why = f"the file began with {expected} rows, and one score has one format"
            raise _problem(where, f"is a {kind} row", why, "split the file by format")
        yield kind, PARSERS[kind](row, where)


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line, unique=False)
    except ValueError as error:
        raise _problem(where, "not valid JSON", str(error), "mend or remove the line") from error
    if not isinstance(row, dict):
        why = "a row is one JSON object"
        raise _problem(where, f"holds a {type(row).__name__}", why, "mend or remove the line")
    return row


def _kind_of(row: dict[str, Any], where: str) -> TaskKind:
    for keys, kind in FORMATS.items():
        if keys <= row.keys():
            return kind
    known = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for keys, kind in FORMATS.items())
    seen = ", ".join(sorted(row)) or "no keys"
    fix = "rename the keys to one of these formats, or use harness:NAME"
    raise _problem(where, f"a row with {seen}", f"known formats are {known}", fix)


def _multiple_choice(row: dict[str, Any], where: str) -> TaskItem:
    choices = _strings(row, "choices", where)
    query = _string(row, "query", where, empty=True)
    return TaskItem((query,) * len(choices), choices, _gold(row, len(choices), where))


def _schema(row: dict[str, Any], where: str) -> TaskItem:
    contexts = _strings(row, "context_options", where)
    continuation = _string(row, "continuation", where)
    return TaskItem(contexts, (continuation,) * len(contexts), _gold(row, len(contexts), where))


def _completion(row: dict[str, Any], where: str) -> TaskItem:
    context = _string(row, "context", where, empty=True)
    return TaskItem((context,), (_string(row, "continuation", where),), 0)


PARSERS: dict[TaskKind, Callable[[dict[str, Any], str], TaskItem]] = {
    "multiple-choice": _multiple_choice,
    "schema": _schema,
    "completion": _completion,
}


def _read_hellaswag(handle: TextIO, path: Path) -> Iterator[tuple[TaskKind, TaskItem]]:
    """Items of 6 lines: "activity: context", gold index, four endings."""
    lines_per_item = 2 + HELLASWAG_ENDINGS
    start = 1
    while lines := [line.rstrip("\n") for line in islice(handle, lines_per_item)]:
        where = f"{path}:{start}"
        context, *rest = lines
        row: dict[str, Any] = {"query": context, "choices": rest[1:]}
        if len(lines) < lines_per_item or not rest[0].strip().isdecimal():
            why = f"an item is {lines_per_item} lines: context, gold index 0-3, four endings"
            raise _problem(where, "not a HellaSwag item", why, "fetch the file again")
        row["gold"] = int(rest[0])
        yield "multiple-choice", _multiple_choice(row, where)
        start += lines_per_item


def _string(row: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str) or not (empty or value.strip()):
        why = f"{key} is {'a string' if empty else 'a string that is not blank'}"
        raise _problem(where, f"{key} is {value!r}", why, "mend or remove the line")
    return value


def _strings(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = row[key]
    if not isinstance(values, list) or len(values) < 2:
        why = f"{key} is a list of at least two strings"
        raise _problem(where, f"{key} is {values!r}", why, "mend or remove the line")
    return tuple(_string({key: value}, key, where) for value in values)


def _gold(row: dict[str, Any], count: int, where: str) -> int:
    gold = row["gold"]
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < count:
        why = f"gold is the index of one of {count} candidates, counted from 0"
        raise _problem(where, f"gold is {gold!r}", why, "mend or remove the line")
    return gold


def _split_name(path: Path) -> tuple[str, str]:
    """File name without suffix, and the suffix, ``.bz2`` kept with the one before it."""
    for suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix), suffix
    why = f"known suffixes are {', '.join((*JSON_SUFFIXES, *TEXT_SUFFIXES))}"
    fix = "write the items as jsonl, one object a line"
    raise _problem(str(path), "not a task file by its suffix", why, fix)


def _open(path: Path) -> TextIO:
    if path.name.endswith(".bz2"):
        return bz2.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _problem(where: str, what: str, why: str, fix: str) -> WeaverError:
    return WeaverError(f"{where}: {what}", why=why, fix=fix)


_HINT = "DIR gives the folder that task names are relative to"
