"""Header of a GGUF file from strangers, walked within limits before a library reads it.

The libraries that read GGUF follow every length and count they find: a hostile file costs them
memory and time without end, and a tensor that lies outside the file is noticed last.

Layout: magic, version, number of tensors, number of fields; fields (key, type, value); tensors
(name, dimensions, type, offset); then, aligned, their bytes. All little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

# Far above any published model.
MAX_TENSORS = 2**17
MAX_FIELDS = 2**14
MAX_NAME_BYTES = 2**16
MAX_ITEMS = 2**22
MAX_DEPTH = 4
MAX_DIMENSIONS = 8
VERSIONS = (2, 3)
_ALIGNMENT, _ALIGNMENT_KEY = 32, b"general.alignment"
_STRING, _ARRAY, _UINT32 = 8, 9, 4
# Bytes of the other types of values, by their number.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def check_header(path: Path) -> dict[str, int]:
    """Walk the header of a GGUF file.

    Returns:
        How many values each tensor has, by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: a length, count or depth is beyond its limit or the file's end, a type is
            unknown, or a tensor lies outside the file or on another one.
    """
    with (
        path.open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return _Walk(content).tensors()


class _Walk:
    """A walk through a header, from its first byte.

    Args:
        content: the whole file.
    """

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.at = 4
        self.items = 0
        self.alignment = _ALIGNMENT

    def tensors(self) -> dict[str, int]:
        """Number of values of every tensor, when everything is checked."""
        (version,) = self._read("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version}, not one of {VERSIONS}")
        tensors, fields = self._read("QQ")
        _limit("tensors", tensors, MAX_TENSORS)
        _limit("fields", fields, MAX_FIELDS)
        for _ in range(fields):
            self._field()
        found: dict[str, int] = {}
        spans: list[tuple[int, int]] = []
        for _ in range(tensors):
            name = self._text(MAX_NAME_BYTES).decode()
            if name in found:
                raise ValueError(f"tensor {name!r} stands there twice")
            found[name], span = self._tensor(name)
            spans.append(span)
        self._check_spans(spans)
        return found

    def _field(self) -> None:
        key = self._text(MAX_NAME_BYTES)
        (kind,) = self._read("I")
        if key == _ALIGNMENT_KEY:
            if kind != _UINT32:
                raise ValueError("general.alignment is no number of 32 bits")
            (self.alignment,) = self._read("I")
            if self.alignment not in [2**power for power in range(21)]:
                raise ValueError(f"alignment of {self.alignment} bytes")
        else:
            self._value(kind, 0)

    def _value(self, kind: int, depth: int) -> None:
        if kind == _STRING:
            self._text(len(self.content))
        elif kind == _ARRAY:
            if depth == MAX_DEPTH:
                raise ValueError(f"arrays in arrays, more than {MAX_DEPTH} deep")
            inner, count = self._read("IQ")
            self.items += count
            _limit("values in arrays", self.items, MAX_ITEMS)
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
            else:
                for _ in range(count):
                    self._value(inner, depth + 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise ValueError(f"value of unknown type {kind}")

    def _tensor(self, name: str) -> tuple[int, tuple[int, int]]:
        """Values of one tensor, and where its bytes lie behind the header."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        (dimensions,) = self._read("I")
        _limit(f"dimensions of {name!r}", dimensions, MAX_DIMENSIONS)
        shape = self._read(f"{dimensions}Q")
        kind, begin = self._read("IQ")
        if kind not in list(GGMLQuantizationType):
            raise ValueError(f"tensor {name!r} is of unknown type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        count = math.prod(shape)
        if count % block or begin % self.alignment:
            raise ValueError(f"tensor {name!r} of shape {list(shape)} does not fill its blocks")
        return count, (begin, begin + count // block * size)

    def _check_spans(self, spans: list[tuple[int, int]]) -> None:
        start = -(-self.at // self.alignment) * self.alignment
        last = 0
        for begin, end in sorted(spans):
            if begin < last:
                raise ValueError(f"two tensors share the bytes from {begin}")
            last = end
        if start + last > len(self.content):
            raise ValueError(f"{len(self.content)} bytes, of {start + last} that its tensors need")

    def _text(self, limit: int) -> bytes:
        (length,) = self._read("Q")
        _limit("bytes of a name", length, limit)
        begin = self.at
        self._skip(length)
        return self.content[begin : self.at]

    def _read(self, layout: str) -> tuple[int, ...]:
        begin = self.at
        self._skip(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.content, begin)

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.content):
            raise ValueError("the header goes on behind the end of the file")


def _limit(what: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValueError(f"{count} {what}, more than {limit}")
