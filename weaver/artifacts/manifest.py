"""Manifest and fingerprint of a stage: configuration, inputs, outputs and environment."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from weaver.artifacts.store import canonical_json, read_json, text_digest, write_json
from weaver.errors import WeaverError, shell

SCHEMA_VERSION = 4
# Written first and last into a stage's folder.
REQUEST, MANIFEST = "stage.json", "manifest.json"
# The model card is no part of a result: eval completes it, and no stage reads it.
CARD = "README.md"
_PACKAGES = ("weaver-moe", "torch", "transformers", "safetensors", "numpy", "scipy")


class ModelIdentity(BaseModel):
    """Which model an artifact was made from.

    Args:
        path: what the user named: a folder, a .gguf file or a hub name.
        folder: where the safetensors files lie.
        revision: the hub revision, if one was asked for.
        trust_remote_code: whether the model's own code may run.
        model_type: ``config.model_type``.
        digest: over the configuration and every weight file.
        tokenizer_digest: over the tokenizer's files.
        files: size and modification time of each weight file and of ``config.json``, so that
            unchanged files are not read again just to compute the same digest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    path: str
    folder: str
    revision: str | None
    trust_remote_code: bool
    model_type: str
    digest: str
    tokenizer_digest: str
    files: dict[str, tuple[int, int]]


class InputRef(BaseModel):
    """A parent artifact: where it lies and the digest of its content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    digest: str


class StageRequest(BaseModel):
    """Everything that decides a stage's result; its digest is the stage's fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    stage: str
    seed: int
    config: dict[str, Any]
    inputs: dict[str, InputRef]

    @property
    def fingerprint(self) -> str:
        """Digest over stage, seed, configuration and the parents' digests (not their paths)."""
        payload = self.model_dump(mode="json")
        payload["inputs"] = {name: ref.digest for name, ref in self.inputs.items()}
        return text_digest(canonical_json(payload))

    def differences(self, other: StageRequest) -> list[str]:
        """List the seed and configuration keys that differ from another request, one line each.

        With the method its options and defaults differ: then it stands alone.
        """
        mine = _flatten({"seed": self.seed, **self.config})
        theirs = _flatten({"seed": other.seed, **other.config})
        keys = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
        return [
            f"{key}: {theirs.get(key)!r} on disk, {mine.get(key)!r} asked for"
            for key in (["method"] if "method" in keys else sorted(keys))
        ]

    def changed_inputs(self, other: StageRequest) -> list[str]:
        """Names of the parents whose content differs from another request's."""
        names = self.inputs.keys() | other.inputs.keys()
        digests = [(n, self.inputs.get(n), other.inputs.get(n)) for n in sorted(names)]
        return [n for n, a, b in digests if a is None or b is None or a.digest != b.digest]


class StageManifest(BaseModel):
    """Written last into a stage's folder: its presence says that the stage is complete.

    Args:
        request: what was asked for; ``request.fingerprint`` identifies the result.
        model: the dense model at the root of the chain.
        outputs: digest of every file, by path relative to the stage's folder.
        digest: digest over ``outputs``; what children record as their input.
        summary: the stage's own figures, for tables.
        dtype: dtype of the computation.
        device: where the command that finished the stage computed; no part of the fingerprint.
        seconds: wall-clock time of the command that finished the stage.
        peak_memory_bytes: high-water mark of that process.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    request: StageRequest
    model: ModelIdentity
    outputs: dict[str, str]
    digest: str
    summary: dict[str, Any]
    dtype: str
    device: str = "cpu"
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    git_commit: str | None
    finished_at: str

    @field_validator("outputs")
    @classmethod
    def _inside(cls, outputs: dict[str, str]) -> dict[str, str]:
        for name in outputs:
            path = PurePosixPath(name)
            if path.is_absolute() or not path.parts or {".", ".."} & set(name.split("/")):
                raise ValueError(f"output {name!r} lies outside the stage's folder")
            if not name.isprintable():
                raise ValueError(f"output {name!r} has no name that can be printed")
        return outputs


def outputs_digest(outputs: dict[str, str]) -> str:
    """Digest over the files' digests."""
    return text_digest(canonical_json(outputs))


def write_manifest(folder: Path, manifest: StageManifest) -> None:
    """Write the manifest, which completes the stage."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(folder: Path, *, rebuild: str) -> StageManifest:
    """Read a stage's manifest.

    Raises:
        WeaverError: it is missing, damaged, or of another schema.
    """
    path = folder / MANIFEST
    raw = read_json(path, rebuild=f"{rebuild} --force")
    request = raw.get("request") if isinstance(raw, dict) else None
    found = request.get("schema_version") if isinstance(request, dict) else None
    if found != SCHEMA_VERSION:
        raise WeaverError(
            f"{path}: schema version {found}",
            why=f"this weaver reads and writes schema version {SCHEMA_VERSION}",
            fix=f"make the stage again: {rebuild} --force",
        )
    try:
        return StageManifest.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        raise WeaverError(
            f"{path}: not a valid manifest, {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            why="it was written by another version or changed by hand",
            fix=f"{rebuild} --force",
        ) from error


def read_request(path: Path, command: str) -> StageRequest:
    """Read a stage's ``stage.json``; ``command`` makes the stage, for messages.

    Raises:
        WeaverError: it is missing, damaged or not what a stage writes.
    """
    fix = f"{shell('mv', path.parent, 'ELSEWHERE')}, then {command}"
    try:
        return StageRequest.model_validate(read_json(path, rebuild=fix))
    except ValidationError as error:
        raise WeaverError(
            f"{path}: not a valid stage request",
            why=str(error.errors()[0]["msg"]),
            fix=fix,
        ) from error


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the weaver source tree, if it is one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def peak_memory_bytes() -> int:
    """High-water mark of this process's resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = _numbered(value)
        if isinstance(nested, dict) and nested:
            flat |= _flatten(nested, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _numbered(value: Any) -> Any:
    """A list of mappings as a mapping by position, from 1; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return {str(number): each for number, each in enumerate(value, start=1)}
    return value
