"""Tensor files of a training at work, which no manifest lists: each holds its own digest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weaver.artifacts.store import (
    canonical_json,
    read_tensors,
    text_digest,
    values_digest,
    write_tensors,
)
from weaver.errors import WeaverError

_DIGEST = "digest"


def write_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with a digest over tensors and metadata.

    Raises:
        WeaverError: the folder cannot be written.
    """
    write_tensors(path, tensors, {**metadata, _DIGEST: _digest(tensors, metadata)})


def read_sealed(path: Path, *, rebuild: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write_sealed`` wrote: the tensors, and the metadata without the digest.

    Raises:
        WeaverError: the file is missing, or not what was written; ``rebuild`` is the advice.
    """
    tensors, metadata = read_tensors(path, rebuild=rebuild)
    noted, found = metadata.pop(_DIGEST, None), _digest(tensors, metadata)
    if noted != found:
        raise WeaverError(
            f"{path}: damaged, digest {found[:12]} instead of {str(noted)[:12]}",
            why="the file changed after it was written",
            fix=rebuild,
        )
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    return text_digest(canonical_json([dict(metadata), values_digest(tensors)]))
