"""Task files: the formats and what is said about the others."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import pytest

from weaver.errors import WeaverError
from weaver.evaluation.task_files import TaskItem, read_task, resolve_task_path

CHOICE = {"query": "q", "choices": ["a", "b"], "gold": 1}
SCHEMA = {"context_options": ["x", "y"], "continuation": "z", "gold": 0}
COMPLETION = {"context": "c", "continuation": "d"}
HELLASWAG = "Sport: he\n2\nw\nx\ny\nz\nFood: she\n0\na\nb\nc\nd\n"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_format_is_recognised_by_its_keys(tmp_path: Path) -> None:
    choice = read_task(write(tmp_path / "arc.jsonl", CHOICE | {"category": "extra"}))
    assert (choice.name, choice.kind) == ("arc", "multiple-choice")
    assert choice.items == (TaskItem(("q", "q"), ("a", "b"), 1),)
    schema = read_task(write(tmp_path / "s.jsonl", SCHEMA))
    assert schema.kind == "schema"
    assert schema.items == (TaskItem(("x", "y"), ("z", "z"), 0),)
    completion = read_task(write(tmp_path / "l.jsonl", COMPLETION))
    assert completion.kind == "completion"
    assert completion.items == (TaskItem(("c",), ("d",), 0),)


@pytest.mark.parametrize("suffix", [".txt", ".txt.bz2"])
def test_hellaswag_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"hellaswag{suffix}"
    path.write_bytes(bz2.compress(HELLASWAG.encode()) if "bz2" in suffix else HELLASWAG.encode())
    task = read_task(path)
    assert (task.name, task.kind) == ("hellaswag", "multiple-choice")
    assert task.items[0] == TaskItem(("Sport: he",) * 4, ("w", "x", "y", "z"), 2)
    assert task.items[1].gold == 0
    assert len(task.items) == 2


def test_limit_takes_the_first_items_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *[COMPLETION | {"context": str(i)} for i in range(5)])
    path.write_text(path.read_text() + "not json\n")
    assert [item.contexts[0] for item in read_task(path, 3).items] == ["0", "1", "2"]
    with pytest.raises(ValueError, match="limit=0"):
        read_task(path, 0)


def test_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"\n{json.dumps(COMPLETION)}\n\n{json.dumps(COMPLETION)}\n")
    assert len(read_task(path).items) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t", "label": 1}, r"t.jsonl:2: a row with label, text"),
        ({}, "a row with no keys"),
        ([1], "holds a list"),
        (CHOICE, "is a multiple-choice row"),
        (COMPLETION | {"continuation": " "}, "continuation is ' '"),
        (COMPLETION | {"context": 3}, "context is 3"),
    ],
)
def test_foreign_rows_are_named_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(WeaverError, match=message):
        read_task(write(tmp_path / "t.jsonl", COMPLETION, row))


def test_a_foreign_row_lists_the_known_formats(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="a row with text") as error:
        read_task(write(tmp_path / "t.jsonl", {"text": "t"}))
    assert "multiple-choice: choices, gold, query" in error.value.why
    assert "completion: context, continuation" in error.value.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 2}, "gold is 2"),
        ({"gold": -1}, "gold is -1"),
        ({"gold": True}, "gold is True"),
        ({"gold": "1"}, "gold is '1'"),
        ({"choices": ["a"]}, r"choices is \['a'\]"),
        ({"choices": "ab"}, "choices is 'ab'"),
        ({"choices": ["a", ""]}, "choices is ''"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeaverError, match=message):
        read_task(write(tmp_path / "t.jsonl", CHOICE | change))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text(json.dumps(CHOICE) + "\n{\n")
    with pytest.raises(WeaverError, match=r"j.jsonl:2: not valid JSON"):
        read_task(tmp_path / "j.jsonl")
    (tmp_path / "h.txt").write_text(HELLASWAG[:-4])
    with pytest.raises(WeaverError, match=r"h.txt:7: not a HellaSwag item"):
        read_task(tmp_path / "h.txt")
    (tmp_path / "g.txt").write_text(HELLASWAG.replace("\n2\n", "\n4\n"))
    with pytest.raises(WeaverError, match=r"g.txt:1: gold is 4"):
        read_task(tmp_path / "g.txt")
    (tmp_path / "b.txt.bz2").write_bytes(bz2.compress(HELLASWAG.encode())[:-5])
    with pytest.raises(WeaverError, match="cannot be read"):
        read_task(tmp_path / "b.txt.bz2")
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(WeaverError, match="holds no item"):
        read_task(tmp_path / "e.jsonl")
    (tmp_path / "p.parquet").write_text("")
    with pytest.raises(WeaverError, match="not a task file by its suffix"):
        read_task(tmp_path / "p.parquet")
    with pytest.raises(WeaverError, match="no such file"):
        read_task(tmp_path / "absent.jsonl")


def test_tasks_are_looked_for_here_then_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, data = tmp_path / "here", tmp_path / "data"
    (here / "mc").mkdir(parents=True)
    (data / "mc").mkdir(parents=True)
    monkeypatch.chdir(here)
    write(data / "mc" / "t.jsonl", CHOICE)
    assert resolve_task_path("mc/t.jsonl", data) == data / "mc" / "t.jsonl"
    write(here / "mc" / "t.jsonl", CHOICE)
    assert resolve_task_path("mc/t.jsonl", data) == Path("mc/t.jsonl")
    with pytest.raises(WeaverError, match=r"task 'mc/u.jsonl': no such file") as error:
        resolve_task_path("mc/u.jsonl", None)
    assert "--data-dir" in error.value.fix
