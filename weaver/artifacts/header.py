"""Headers of safetensors files and JSON from strangers, read within limits and checked.

The library that reads tensors checks a header too, but a hostile one first costs it memory and
time, or ends the process that asked. Sizes, shapes and names are known from here on, without
opening a file again for each tensor.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the safetensors library has it; the JSON below it may be nested as deep as Python parses.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
# Bytes of a value.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a safetensors file, as the header describes it.

    Args:
        dtype: as the format calls it, a key of ``ITEM_SIZES``.
        shape: its shape.
        begin, end: where its bytes lie, counted from behind the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file.

    Args:
        entries: the tensors by name.
        metadata: texts by name.
        start: bytes in front of the first tensor.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    start: int

    @property
    def end(self) -> int:
        """Size that the file has to have."""
        return self.start + max((entry.end for entry in self.entries.values()), default=0)


def parse_json(text: str | bytes, *, unique: bool = True) -> Any:
    """Parse JSON of which nothing is known.

    Args:
        text: the JSON.
        unique: refuse a mapping in which a name stands twice.

    Raises:
        ValueError: it is not JSON, nested too deeply, holds a number with thousands of digits, half
            of a surrogate pair, or with ``unique`` a name twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        # Half of a pair is JSON, but no text: it could be neither printed nor written.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Every tensor lies inside the file, has the bytes that shape and dtype ask for, and shares them
    with no other one; the file's length is left to the caller.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such header.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{size} bytes hold no header")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise ValueError(f"header of {length} bytes is longer than the file")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes, more than {MAX_HEADER_BYTES}")
        values = parse_json(handle.read(length))
    if not isinstance(values, dict):
        raise ValueError("the header is no mapping")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is no mapping of texts")
    entries = {name: _entry(name, value) for name, value in values.items()}
    _check_layout(entries)
    return Header(entries, metadata, 8 + length)


def _entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, not one of {', '.join(ITEM_SIZES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has data_offsets {offsets!r}")
    entry = TensorEntry(dtype, tuple(shape), *offsets)
    expected = entry.elements * ITEM_SIZES[dtype]
    if entry.end - entry.begin != expected:
        raise ValueError(
            f"tensor {name!r} has {entry.end - entry.begin} bytes, {dtype} of shape {shape} "
            f"has {expected}"
        )
    return entry


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**63
        for each in values
    )


def _check_layout(entries: dict[str, TensorEntry]) -> None:
    """Tensors lie one behind the other, without gaps."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(f"tensor {name!r} begins at {entry.begin} instead of {position}")
        position = entry.end


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice")
    return values
