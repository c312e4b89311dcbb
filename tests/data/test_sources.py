from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from weaver.data.hub import hub_rows
from weaver.data.sources import DataSpec, Document, parse_data_spec, read_documents, split_text
from weaver.errors import WeaverError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "location", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl:0.5", "a.jsonl", 0.5),
        ("builtin:calibration", "builtin:calibration", 1.0),
        ("builtin:calibration:2", "builtin:calibration", 2.0),
        ("hf:allenai/c4,en,text=body:1e-1", "hf:allenai/c4,en,text=body", 0.1),
        ("c:/data/a.txt", "c:/data/a.txt", 1.0),
        (" a.jsonl:.25 ", "a.jsonl", 0.25),
    ],
)
def test_parse_data_spec(text: str, location: str, weight: float) -> None:
    assert parse_data_spec(text) == DataSpec(location, weight)


@pytest.mark.parametrize("text", ["a.jsonl:0", "a.jsonl:-1", "a.jsonl:1e999"])
def test_parse_data_spec_refuses_weights_that_are_not_positive(text: str) -> None:
    with pytest.raises(WeaverError, match="has weight"):
        parse_data_spec(text)


def test_parse_data_spec_refuses_nothing() -> None:
    with pytest.raises(WeaverError, match="empty data location"):
        parse_data_spec("  ")


def test_jsonl_rows_of_every_shape(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {"text": "plain"},
        {"prompt": "2+2=", "completion": "4", "task": "sums"},
        {"prompt": "Q:\n", "completion": "yes", "domain": "quiz"},
        {"context": "once upon", "continuation": " a time", "group": 3},
        {"text": "  \n", "task": "blank"},
    )
    assert read_documents(str(path), None) == [
        Document("plain", "mixed"),
        Document("2+2= 4", "sums"),
        Document("Q:\nyes", "quiz"),
        Document("once upon a time", "3"),
    ]


def test_json_holds_a_list_or_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b", "task": "t"}], indent=1))
    assert read_documents(str(path), None) == [Document("a", "rows"), Document("b", "t")]
    path.write_text('{"text": "alone"}')
    assert read_documents(str(path), None) == [Document("alone", "rows")]


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"], "task": ["t", None]}), path)
    assert read_documents(str(path), None) == [Document("a", "t"), Document("b", "table")]
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(WeaverError, match=r"table\.parquet: cannot be read"):
        read_documents(str(path), None)


def test_raw_is_one_document_in_the_layout_of_wikitext(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n \n Text . \n")
    (document,) = read_documents(str(path), None)
    assert document == Document("\n\n = Title = \n\n\n\n\n Text . \n", "wiki")


def test_txt_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join([b"a" * 1500, b"b" * 2498, b"c" * 3000]))
    documents = read_documents(str(path), None)
    assert [document.text for document in documents] == [
        "a" * 1500 + "\n\n" + "b" * 2498,
        "c" * 3000,
    ]
    assert {document.group for document in documents} == {"book"}


def test_split_text_cuts_a_long_paragraph_at_white_space() -> None:
    assert split_text("one two three\n\n\nfour", 8) == ["one two", "three", "four"]
    assert split_text("abcdefgh", 3) == ["abc", "def", "gh"]
    assert split_text("    indented\n\nb", 20) == ["    indented\n\nb"]
    with pytest.raises(ValueError, match="limit=0"):
        split_text("a", 0)


@given(st.text(alphabet="ab \n\t", max_size=60), st.integers(1, 12))
def test_split_text_keeps_every_visible_character(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= limit for piece in pieces)


def test_a_folder_is_read_by_name_and_other_files_are_left(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"text": "second"})
    write(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "README.md").write_text("not data")
    assert [d.text for d in read_documents(str(tmp_path), None)] == ["first", "second"]


def test_the_current_folder_comes_before_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, data = tmp_path / "here", tmp_path / "data"
    here.mkdir()
    data.mkdir()
    monkeypatch.chdir(here)
    write(data / "a.jsonl", {"text": "from data"})
    assert read_documents("a.jsonl", data)[0].text == "from data"
    write(here / "a.jsonl", {"text": "from here"})
    assert read_documents("a.jsonl", data)[0].text == "from here"


def test_missing_data_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match=r"nope\.jsonl: no such data") as caught:
        read_documents("nope.jsonl", tmp_path)
    assert str(tmp_path / "nope.jsonl") in caught.value.why
    assert "WEAVER_DATA" in caught.value.fix


def test_unknown_builtin() -> None:
    with pytest.raises(WeaverError, match="builtin:test: no such built-in data"):
        read_documents("builtin:test", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "holds no text"),
        ("a.txt", " \n\n ", "holds no text"),
        ("a.raw", "\n \n", "holds no text"),
        ("a.csv", "text\nhello", "unknown kind of data file"),
        ("a.jsonl", '{"text": "a"}\n\n{"query": "b", "gold": 1}\n', r"a\.jsonl:3: .* query, gold"),
        ("a.jsonl", '{"text": 3}\n', r"a\.jsonl:1: has no text"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: cannot be read"),
        ("a.json", '[\n{"text": "a"},\n]', r"a\.json:3: cannot be read"),
        ("a.jsonl", '["text"]\n', r"a\.jsonl:1: holds a list"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(WeaverError, match=message):
        read_documents(str(tmp_path / name), None)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(WeaverError, match=r"a\.txt: cannot be read"):
        read_documents(str(tmp_path / "a.txt"), None)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="holds no data file"):
        read_documents(str(tmp_path), None)


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder that the datasets library loads by the same call as a name on the hub."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.jsonl", {"text": "a", "body": "A"}, {"text": " ", "body": "B"})
    write(folder / "validation.jsonl", {"text": "held out", "body": "C"})
    return folder


def test_hub_rows_with_split_and_column(hub_folder: Path) -> None:
    assert read_documents(f"hf:{hub_folder}", None) == [Document("a", "corpus")]
    assert read_documents(f"hf:{hub_folder},split=validation", None) == [
        Document("held out", "corpus")
    ]
    assert read_documents(f"hf:{hub_folder},text=body", None) == [
        Document("A", "corpus"),
        Document("B", "corpus"),
    ]


def test_hub_errors(hub_folder: Path) -> None:
    with pytest.raises(WeaverError, match="has no column 'nope'"):
        read_documents(f"hf:{hub_folder},text=nope", None)
    with pytest.raises(WeaverError, match="cannot be read through datasets"):
        read_documents(f"hf:{hub_folder},split=nope", None)


@pytest.mark.parametrize("location", ["hf:", "hf:a,b,c", "hf:a,columns=b"])
def test_hub_locations_that_are_malformed(location: str) -> None:
    with pytest.raises(WeaverError, match="not a location on the hub"):
        hub_rows(location)


@pytest.mark.parametrize("row", ['{"text": ' + "[" * 99_999, '{"text": "\\ud800"}', "9" * 6000])
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_rows_that_trip_the_parser_up(row: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_text(row)
    with pytest.raises(WeaverError, match=r"rows\.json"):
        read_documents(str(path), None)
