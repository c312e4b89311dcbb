"""Files are complete or absent, damage is noticed, digests follow the content alone."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weaver.artifacts.store import (
    METADATA_KEY,
    atomic_path,
    canonical_json,
    check_tensors_file,
    file_digest,
    read_json,
    read_tensors,
    tensors_digest,
    text_digest,
    values_digest,
    write_json,
    write_model_shard,
    write_tensors,
    write_text,
)
from weaver.errors import WeaverError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


def tensors_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(3, 4, generator=generator),
        "a": torch.arange(5),
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3, dtype=torch.int64),
    }


def write_half(path: Path, error: BaseException) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent
        raise error


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    with pytest.raises(RuntimeError, match="half way"):
        write_half(path, RuntimeError("half way"))
    assert list(path.parent.iterdir()) == []


def test_a_block_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        write_half(path, KeyboardInterrupt("Ctrl-C"))
    assert path.read_text() == "old"
    write_text(path, "newer")
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("all")
        assert not path.exists()
        # Hidden and marked, so that the next run finds and removes what a killed one left.
        assert temporary.name.startswith(".file.txt.")
        assert temporary.name.endswith(".tmp")
    assert path.read_text() == "all"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "folder" / "x.safetensors"
    with pytest.raises(WeaverError, match=r"x\.safetensors: cannot be written") as caught:
        write_tensors(path, tensors_of(), {})
    assert caught.value.why == "Not a directory"
    assert "--run-dir" in caught.value.fix


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 256 KiB: the write fails half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk(tmp_path: Path) -> None:
    write_tensors(tmp_path / "small.safetensors", {"x": torch.zeros(1000)}, {})
    with pytest.raises(WeaverError, match=r"large\.safetensors: cannot be written") as caught:
        write_tensors(tmp_path / "large.safetensors", {"x": torch.zeros(200_000)}, {})
    assert "free space" in caught.value.fix
    with pytest.raises(WeaverError, match=r"large\.txt: cannot be written"):
        write_text(tmp_path / "large.txt", "x" * 800_000)
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path, metadata = tmp_path / "x.safetensors", {"layer": 3, "name": "Straße", "nested": [1, None]}
    write_tensors(path, tensors_of(), metadata)
    found, found_metadata = read_tensors(path)
    assert found_metadata == metadata
    assert found.keys() == tensors_of().keys()
    for name, tensor in tensors_of().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_transposed_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    path, matrix = tmp_path / "x.safetensors", torch.arange(6.0).reshape(2, 3)
    write_tensors(path, {"t": matrix.T}, {})
    assert torch.equal(read_tensors(path)[0]["t"], matrix.T)


def header_metadata(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def test_the_header_holds_one_key(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", tensors_of(), {"b": 1, "a": 2, "c": 3})
    assert header_metadata(tmp_path / "x.safetensors") == {METADATA_KEY: '{"a":2,"b":1,"c":3}'}
    write_model_shard(tmp_path / "m.safetensors", tensors_of())
    assert header_metadata(tmp_path / "m.safetensors") == {"format": "pt"}


def test_the_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    metadata = {name: index for index, name in enumerate("zyxwvutsrqponm")}
    write_tensors(tmp_path / "here.safetensors", tensors_of(), metadata)
    script = (
        "from pathlib import Path\n"
        "from weaver.artifacts.store import read_tensors, write_tensors\n"
        f"tensors, metadata = read_tensors(Path({str(tmp_path / 'here.safetensors')!r}))\n"
        "tensors = dict(reversed(tensors.items()))\n"
        "metadata = dict(reversed(metadata.items()))\n"
        f"write_tensors(Path({str(tmp_path / 'there.safetensors')!r}), tensors, metadata)\n"
    )
    prelude = "import sys; sys.argv = ['weaver']\n"  # Leaves the model classes out.
    subprocess.run([sys.executable, "-c", prelude + script], check=True)
    here, there = (tmp_path / f"{name}.safetensors" for name in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()


def test_digests_do_not_see_the_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    write_tensors(one, tensors_of(), {"layer": 1, "top_k": 2})
    write_tensors(two, dict(reversed(tensors_of().items())), {"top_k": 2, "layer": 1})
    assert tensors_digest(one) == tensors_digest(two) == file_digest(one)
    assert values_digest(tensors_of()) == values_digest(dict(reversed(tensors_of().items())))


def test_a_digest_sees_the_metadata(tmp_path: Path) -> None:
    """The top-k of a layout stands there, and decides what the model computes."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    write_tensors(one, tensors_of(), {"top_k": 1})
    write_tensors(two, tensors_of(), {"top_k": 2})
    assert tensors_digest(one) != tensors_digest(two)


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.tensor([0, 1, 2, 3, 5])},
        {"a": torch.arange(5, dtype=torch.int32)},
        {"a": torch.arange(5).reshape(5, 1)},
        {"empty": torch.zeros(3, 0, dtype=torch.int64)},
        {"scalar": torch.tensor([2.5], dtype=torch.bfloat16)},
        {"c": torch.zeros(0)},
    ],
)
def test_digests_see_names_dtypes_shapes_and_values(
    tmp_path: Path, change: dict[str, Tensor]
) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors_of(), {})
    before = tensors_digest(path)
    write_tensors(path, tensors_of() | change, {})
    assert tensors_digest(path) != before
    assert values_digest(tensors_of() | change) != values_digest(tensors_of())


@settings(max_examples=40)
@given(
    names=st.lists(st.text("abc._", min_size=1), min_size=1, max_size=4, unique=True),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 3), max_size=3),
    metadata=st.dictionaries(st.text(), st.integers() | st.text()),
)
def test_anything_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    dtype: torch.dtype,
    shape: list[int],
    metadata: dict[str, int | str],
) -> None:
    path = tmp_path_factory.mktemp("store") / "x.safetensors"
    tensors = {name: torch.randn(shape).mul(100).to(dtype) for name in names}
    write_tensors(path, tensors, metadata)
    found, found_metadata = read_tensors(path)
    assert found_metadata == metadata
    assert values_digest(found) == values_digest(tensors)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors_of(), {})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(WeaverError, match=r"x\.safetensors: damaged, \d+ bytes instead") as caught:
        read_tensors(path, rebuild="weaver calibrate --run-dir r")
    assert caught.value.fix == "weaver calibrate --run-dir r"


def test_a_file_with_bytes_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors_of(), {})
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(WeaverError, match=r"damaged, \d+ bytes instead") as caught:
        check_tensors_file(path)
    assert caught.value.fix == f"delete {path} and rerun the stage that writes it"


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05",
        struct.pack("<Q", 2**60),
        with_header(b"{"),
        with_header(b"3"),
        with_header(b"[]"),
        with_header(b"\xff\xfe"),
        with_header(b'{"x": 3}'),
        with_header(b'{"x": {}}'),
        with_header(b'{"x": {"data_offsets": [0]}}'),
        with_header(b'{"x": {"data_offsets": ["a", "b"]}}'),
        with_header(b'{"__metadata__": 3}'),
        with_header(b'{"__metadata__": {"weaver": "{"}}'),
        with_header(b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
    ],
)
def test_a_damaged_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeaverError, match=r"x\.safetensors: damaged"):
        check_tensors_file(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match=r"x\.safetensors: missing"):
        read_tensors(tmp_path / "x.safetensors")
    with pytest.raises(WeaverError, match=r"x\.json: missing") as caught:
        read_json(tmp_path / "x.json", rebuild="weaver eval")
    assert caught.value.fix == "weaver eval"


def test_json(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "Straße"], "a": {}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", rebuild="") == value
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "b": [')
    assert text.endswith("}\n")
    assert "Straße" in text
    for damaged in (b'{"b": [1, 2', b"\xff\xfe\x00"):
        (tmp_path / "x.json").write_bytes(damaged)
        with pytest.raises(WeaverError, match=r"x\.json: damaged"):
            read_json(tmp_path / "x.json", rebuild="weaver eval")


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, {"d": 2, "c": None}], "a": "é"}) == (
        '{"a":"é","b":[1,{"c":null,"d":2}]}'
    )
    # SHA-256 of "abc", the standard's own example.
    assert text_digest("abc").startswith("ba7816bf8f01cfea")


def test_the_digest_of_another_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc")
    assert file_digest(tmp_path / "x.txt") == text_digest("abc")
