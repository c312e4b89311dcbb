"""Decides from what is on disk whether a stage is skipped, resumed, run or refused.

A stage's folder holds ``stage.json`` (what is being made, written first), the outputs (each written
under a temporary name and renamed), and ``manifest.json`` (written last: the stage is complete).
"""

from __future__ import annotations

import datetime
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from weaver.artifacts.manifest import (
    MANIFEST,
    InputRef,
    ModelIdentity,
    StageManifest,
    StageRequest,
    git_commit,
    outputs_digest,
    peak_memory_bytes,
    read_manifest,
    versions,
    write_manifest,
)
from weaver.artifacts.store import (
    atomic_path,
    check_tensors_file,
    file_digest,
    read_json,
    write_error,
    write_json,
)
from weaver.errors import WeaverError

REQUEST = "stage.json"
Status = Literal["skip", "resume", "run"]
Advance = Callable[[str], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]

# Folder of each stage inside a run directory, and the subcommand that writes it.
STAGE_FOLDERS: dict[str, str] = {
    "calibrate": "calibrate",
    "partition": "partition",
    "build-router": "router",
    "assemble": "model",
    "finetune": "finetune",
    "eval": "eval",
    "bench": "bench",
}


@contextmanager
def no_progress(_title: str, _total: int) -> Iterator[Advance]:
    """A progress display that shows nothing."""
    yield lambda _note: None


class WouldRun(Exception):  # noqa: N818 - a message to the planner, not an error
    """A dry run has come to the point where the stage would begin to work."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class StageContext:
    """What every stage needs besides its configuration.

    Args:
        run_dir: the run directory.
        seed: root of all randomness.
        force: throw away what the stage's folder holds and make it again.
        dry_run: stop with ``WouldRun`` before anything is written.
        data_dir: where data files are looked for after the current folder.
        progress: ``progress(title, total)`` gives a context manager that yields ``advance(note)``.
        say: prints one line for the user.
    """

    run_dir: Path
    seed: int = 0
    force: bool = False
    dry_run: bool = False
    data_dir: Path | None = None
    progress: Progress = no_progress
    say: Callable[[str], None] = field(default=lambda _line: None)

    def folder(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.run_dir / STAGE_FOLDERS[stage]


def stage_command(stage: str, run_dir: Path) -> str:
    """The command that makes a stage, for error messages."""
    return f"weaver {stage} --run-dir {run_dir}"


def decide(folder: Path, request: StageRequest, *, force: bool) -> Status:
    """What a request would do, given what is on disk.

    Raises:
        WeaverError: the folder holds another result (its configuration or its parents differ), or
            files that weaver did not write.
    """
    if force or not folder.is_dir() or not any(folder.iterdir()):
        return "run"
    command = stage_command(request.stage, folder.parent)
    if not (folder / REQUEST).exists() and not (folder / MANIFEST).exists():
        raise WeaverError(
            f"{folder}: holds files, but no {REQUEST}",
            why="weaver does not write into a folder that it did not make",
            fix="choose another --run-dir, or move the folder away",
        )
    complete = (folder / MANIFEST).exists()
    existing = (
        read_manifest(folder, rebuild=command).request
        if complete
        else _read_request(folder / REQUEST, command)
    )
    if existing.fingerprint == request.fingerprint:
        return "skip" if complete else "resume"
    raise _refusal(folder, request, existing)


def _refusal(folder: Path, request: StageRequest, existing: StageRequest) -> WeaverError:
    command = stage_command(request.stage, folder.parent)
    differences = request.differences(existing)
    if differences:
        return WeaverError(
            f"{folder}: made with another configuration: {'; '.join(differences)}",
            why="a run directory holds one result a stage",
            fix=f"another --run-dir, or {command} --force",
        )
    changed = ", ".join(request.changed_inputs(existing)) or f"schema {existing.schema_version}"
    return WeaverError(
        f"{folder}: made from another {changed}",
        why=f"{changed} changed after this stage ran",
        fix=f"rerun this stage: {command} --force",
    )


def _read_request(path: Path, command: str) -> StageRequest:
    try:
        return StageRequest.model_validate(read_json(path, rebuild=f"{command} --force"))
    except ValidationError as error:
        raise WeaverError(
            f"{path}: not a valid stage request",
            why=str(error.errors()[0]["msg"]),
            fix=f"{command} --force",
        ) from error


class StageRun:
    """A stage at work in its folder.

    Args:
        context: run directory, seed and flags.
        request: what is asked for.
        model: identity of the dense model.
        dtype: dtype of the computation, for the manifest.
    """

    def __init__(
        self, context: StageContext, request: StageRequest, model: ModelIdentity, dtype: str
    ) -> None:
        self.context = context
        self.request = request
        self.model = model
        self.dtype = dtype
        self.folder = context.folder(request.stage)
        self.started = time.monotonic()
        self.command = stage_command(request.stage, context.run_dir)
        self.status = decide(self.folder, request, force=context.force)

    def begin(self) -> None:
        """Make the folder and note what is being made in it.

        Raises:
            WouldRun: this is a dry run.
        """
        if self.context.dry_run:
            raise WouldRun(self.status)
        if self.status == "run":
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(self.folder / REQUEST, self.request.model_dump(mode="json"))
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()

    def skipped(self) -> StageManifest:
        """The manifest of a complete stage, whose files are checked to be there and whole.

        Raises:
            WeaverError: a file is missing or cut off.
        """
        manifest = read_manifest(self.folder, rebuild=self.command)
        check_outputs(self.folder, manifest, command=self.command)
        return manifest

    def layer_path(self, layer: int) -> Path:
        """File of one layer."""
        return layer_path(self.folder, layer)

    def has_layer(self, layer: int) -> bool:
        """Whether the layer's file is there, and whole.

        Raises:
            WeaverError: the file is there, but damaged.
        """
        path = self.layer_path(layer)
        if not path.exists():
            return False
        check_tensors_file(path, rebuild=f"rm {path}; {self.command}")
        return True

    def finish(self, summary: dict[str, Any]) -> StageManifest:
        """Digest every output and write the manifest."""
        names = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and path.name not in (REQUEST, MANIFEST)
        )
        outputs = {name: file_digest(self.folder / name) for name in names}
        manifest = StageManifest(
            request=self.request,
            model=self.model,
            outputs=outputs,
            digest=outputs_digest(outputs),
            summary=summary,
            dtype=self.dtype,
            seconds=round(time.monotonic() - self.started, 3),
            peak_memory_bytes=peak_memory_bytes(),
            versions=versions(),
            git_commit=git_commit(),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write_manifest(self.folder, manifest)
        return manifest


def layer_path(folder: Path, layer: int) -> Path:
    """File of one layer inside a stage's folder."""
    return folder / f"layer_{layer:03d}.safetensors"


def check_outputs(folder: Path, manifest: StageManifest, *, command: str) -> None:
    """Check that every output of a complete stage is there, tensor files at their full length.

    Raises:
        WeaverError: naming the file and the command that makes it again.
    """
    for name in manifest.outputs:
        path = folder / name
        if path.suffix == ".safetensors":
            check_tensors_file(path, rebuild=f"{command} --force")
        elif not path.is_file():
            raise WeaverError(
                f"{path}: missing",
                why="the stage is complete, so the file was removed afterwards",
                fix=f"{command} --force",
            )


def parent(folder: Path, stage: str) -> tuple[StageManifest, InputRef]:
    """Manifest of a finished parent stage and the reference to it.

    Raises:
        WeaverError: the parent has not finished, or one of its files is damaged.
    """
    command = stage_command(stage, folder.parent)
    if not (folder / MANIFEST).exists():
        raise WeaverError(
            f"{folder}: no finished {stage} stage",
            why=f"this stage reads what {stage} writes",
            fix=command
            if stage != "calibrate"
            else f"weaver calibrate MODEL --run-dir {folder.parent}",
        )
    manifest = read_manifest(folder, rebuild=command)
    if manifest.request.stage != stage:
        raise WeaverError(
            f"{folder}: is a {manifest.request.stage} stage, not {stage}",
            why="the manifest says so",
            fix=f"name the folder that {command} wrote",
        )
    check_outputs(folder, manifest, command=command)
    return manifest, InputRef(path=str(folder.resolve()), digest=manifest.digest)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock goes with the process, even if killed.

    Raises:
        WeaverError: another process works there, or the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(run_dir / ".writable") as probe:
            probe.touch()
        (run_dir / ".writable").unlink(missing_ok=True)
        handle = (run_dir / ".lock").open("w")
    except OSError as error:
        raise write_error(run_dir, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WeaverError(
                f"{run_dir}: another weaver process is at work here",
                why="two processes in one run directory would overwrite each other",
                fix="wait for it, or use another --run-dir",
            ) from error
        yield
