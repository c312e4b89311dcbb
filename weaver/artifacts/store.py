"""Files that are either complete or absent: atomic writes, checked reads, stable digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weaver.artifacts.header import Header, parse_json, read_header
from weaver.artifacts.record import TensorRecord
from weaver.errors import WeaverError, shell

# safetensors files with two or more metadata keys are not byte-stable between processes (the header
# is written in hash order), so everything goes into one key as canonical JSON.
METADATA_KEY = "weaver"

RecordT = TypeVar("RecordT", bound=TensorRecord)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name next to ``path`` that becomes ``path`` when the block ends well.

    Raises:
        WeaverError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link that lies there under this name would be written through.
        temporary.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        # Where even the folder cannot be made, there is nothing to remove either.
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk: a renamed file is not safe before that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content atomically."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Around writers of other libraries: what they raise becomes the error for a full disk.

    Raises:
        WeaverError: the folder cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise write_error(folder, error) from error


def write_error(path: Path, error: Exception) -> WeaverError:
    """The error for a file or folder that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return WeaverError(
        f"{path}: cannot be written",
        why=reason,
        fix="free space or choose a writable --run-dir, then rerun the same command: "
        "finished layers are kept",
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *, rebuild: str) -> Any:
    """Read JSON.

    Raises:
        WeaverError: the file is missing or damaged; ``rebuild`` is the command that makes it.
    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise WeaverError(f"{path}: missing", why="the stage has not run", fix=rebuild) from error
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise WeaverError(f"{path}: damaged", why=str(error), fix=rebuild) from error


def read_error(path: Path, error: OSError) -> WeaverError:
    """The error for a file that is there and cannot be read: the file itself may be whole."""
    return WeaverError(
        f"{path}: cannot be read",
        why=error.strerror or str(error),
        fix="give yourself the right to read it, or check the disk",
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with ``metadata`` as one canonical JSON key."""
    _save(path, tensors, {METADATA_KEY: canonical_json(dict(metadata))})


def write_model_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a shard of a Hugging Face checkpoint atomically, marked the way its loaders expect."""
    _save(path, tensors, {"format": "pt"})


def _save(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # save_file replaces the file by one that only its owner may read.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(contiguous, temporary, metadata=header)
        temporary.chmod(stat.S_IMODE(mode))


def read_tensors(path: Path, *, rebuild: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and its metadata.

    Raises:
        WeaverError: the file is missing, truncated or not safetensors.
    """
    metadata = read_metadata(path, rebuild=rebuild)
    try:
        return load_file(path), metadata
    except (SafetensorError, OSError) as error:
        raise WeaverError(f"{path}: damaged", why=str(error), fix=_fix(path, rebuild)) from error


def read_metadata(path: Path, *, rebuild: str = "") -> dict[str, Any]:
    """The metadata of a safetensors file that is whole.

    Raises:
        WeaverError: the file is missing, truncated or not safetensors.
    """
    return _own_metadata(check_tensors_file(path, rebuild=rebuild))


def check_tensors_file(path: Path, *, rebuild: str = "") -> Header:
    """Check that the file is as long as its header says, without reading the tensors.

    Returns:
        The header.

    Raises:
        WeaverError: the file is missing, truncated or not safetensors.
    """
    fix = _fix(path, rebuild)
    if not path.is_file():
        raise WeaverError(f"{path}: missing", why="the stage has not finished", fix=fix)
    try:
        header = read_header(path)
        _own_metadata(header)
        actual = path.stat().st_size
    except OSError as error:
        raise read_error(path, error) from error
    except ValueError as error:
        raise WeaverError(f"{path}: damaged header", why=str(error), fix=fix) from error
    if actual != header.end:
        raise WeaverError(
            f"{path}: damaged, {actual} bytes instead of {header.end}",
            why="the file was cut off or overwritten after it was written",
            fix=fix,
        )
    return header


def _fix(path: Path, rebuild: str) -> str:
    return rebuild or f"delete {shell(path)} and rerun the stage that writes it"


def _own_metadata(header: Header) -> dict[str, Any]:
    """weaver's own metadata; empty in files of others."""
    values = parse_json(header.metadata.get(METADATA_KEY, "{}"))
    if not isinstance(values, dict):
        raise ValueError("weaver's metadata is no mapping")
    return values


def tensors_digest(path: Path) -> str:
    """SHA-256 over a safetensors file's metadata and sorted (name, dtype, shape, bytes)."""
    header = read_header(path)
    digest = hashlib.sha256(canonical_json(_own_metadata(header)).encode())
    with path.open("rb") as handle:
        for name, entry in sorted(header.entries.items()):
            digest.update(canonical_json([name, entry.dtype, list(entry.shape)]).encode())
            handle.seek(header.start + entry.begin)
            _update(digest, handle, entry.end - entry.begin)
    return digest.hexdigest()


def values_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted (name, dtype, shape, bytes) of tensors in memory."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        values = tensor.detach().cpu().reshape(-1).contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Digest of a file's content: by tensors for safetensors, by bytes for the rest."""
    if path.suffix == ".safetensors":
        return tensors_digest(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_record(path: Path, record: TensorRecord) -> None:
    """Write one of the types of ``artifacts.types``."""
    write_tensors(path, record.tensors(), record.scalars())


def read_record(path: Path, kind: type[RecordT], *, rebuild: str = "") -> RecordT:
    """Read one of the types of ``artifacts.types``.

    Raises:
        WeaverError: the file is missing or damaged, or holds another type.
    """
    tensors, scalars = read_tensors(path, rebuild=rebuild)
    try:
        return kind.build(tensors, scalars)
    except (TypeError, ValueError) as error:
        raise WeaverError(
            f"{path}: not a valid {kind.__name__}",
            why=str(error),
            fix=_fix(path, rebuild),
        ) from error


def _update(digest: Any, handle: Any, size: int) -> None:
    while size > 0:
        block = handle.read(min(size, 1 << 22))
        if not block:
            raise ValueError("file ends before its last tensor")
        digest.update(block)
        size -= len(block)
