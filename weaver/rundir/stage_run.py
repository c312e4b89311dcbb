"""Decides from what is on disk whether a stage is skipped, resumed, run or refused.

A stage's folder holds ``stage.json`` (what is being made, written first), the outputs (each written
under a temporary name and renamed), and ``manifest.json`` (written last: the stage is complete).
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from weaver.artifacts.manifest import (
    MANIFEST,
    REQUEST,
    ModelIdentity,
    StageManifest,
    StageRequest,
    git_commit,
    outputs_digest,
    peak_memory_bytes,
    read_manifest,
    read_request,
    versions,
    write_manifest,
)
from weaver.artifacts.store import (
    check_tensors_file,
    disk_errors,
    file_digest,
    sync_folder,
    write_json,
)
from weaver.artifacts.summaries import Summary
from weaver.errors import WeaverError, shell
from weaver.models.device import CPU
from weaver.rundir.free_disk import require_disk
from weaver.rundir.stage_folders import (
    STAGE_FOLDERS,
    check_outputs,
    layer_path,
    output_names,
    seen_from,
    stage_command,
)

# Names that a killed process leaves behind: weaver's own, and those that safetensors writes under.
TEMPORARY = (".*.tmp", ".tmp*")
Status = Literal["skip", "resume", "run"]
Advance = Callable[[str], None]
Progress = Callable[[str, int], AbstractContextManager[Advance]]


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
    """Settings that every stage shares: run directory, seed, flags, progress and messages.

    Args:
        run_dir: the run directory.
        seed: root of all randomness.
        force: make the stage again; what its folder holds is replaced when the new result is there.
        dry_run: stop with ``WouldRun`` before anything is written.
        data_dir: where data files are looked for after the current folder.
        trust_remote_code: the user lets the dense model's own code run, in this command.
        device: where the stage computes; no part of what it makes.
        progress: ``progress(title, total)`` gives a context manager that yields ``advance(note)``.
        say: prints one line for the user.
    """

    run_dir: Path
    seed: int = 0
    force: bool = False
    dry_run: bool = False
    data_dir: Path | None = None
    trust_remote_code: bool = False
    device: torch.device = CPU
    progress: Progress = no_progress
    say: Callable[[str], None] = field(default=lambda _line: None)

    def folder(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.run_dir / STAGE_FOLDERS[stage]


def decide(
    folder: Path, request: StageRequest, *, force: bool, command: str | None = None
) -> Status:
    """Decide from the stage's folder whether a request has to run, to resume or to be skipped.

    Args:
        folder: the stage's folder.
        request: what is asked for.
        force: replace what the folder holds.
        command: what makes the stage, for messages; by default that of the folder's run directory.

    Raises:
        WeaverError: the folder holds another result (its configuration or its parents differ), or
            files that weaver did not write.
    """
    found = _entries(folder)
    if not found:
        return "run"
    if force and folder.is_symlink():
        raise WeaverError(
            f"{folder}: is a symbolic link",
            why="--force replaces a folder that the stage made itself, and no other one through it",
            fix="remove the link, or choose another folder",
        )
    command = command or stage_command(request.stage, folder.parent)
    made = _made_by_weaver(folder, request.stage, command)
    if force or found == {REQUEST}:
        # A stage that stopped before its first output holds nothing that could be lost.
        return "run"
    complete = (folder / MANIFEST).exists()
    existing = read_manifest(folder, rebuild=command).request if complete else made
    if existing.fingerprint == request.fingerprint:
        return "skip" if complete else "resume"
    raise _refusal(folder, request, existing)


def _made_by_weaver(folder: Path, stage: str, command: str) -> StageRequest:
    """The request that a stage noted before it wrote anything else into a folder.

    It alone says that weaver made the folder: a file of this name does not, nor a manifest, which
    other programs have too. Without it nothing there is ever removed, whatever the flags.

    Raises:
        WeaverError: there is none, it is damaged, or of another stage.
    """
    path = folder / REQUEST
    if not path.is_file():
        raise WeaverError(
            f"{folder}: holds files, but no {REQUEST}",
            why="weaver neither writes into a folder that it did not make nor removes it",
            fix="choose another folder, or move this one away",
        )
    made = read_request(path, command)
    if made.stage != stage:
        raise WeaverError(
            f"{folder}: is a {made.stage} stage, not {stage}",
            why=f"{REQUEST} says so, and a stage removes its own results alone",
            fix="choose another folder, or move this one away",
        )
    return made


def _is_temporary(path: Path) -> bool:
    return any(path.match(pattern) for pattern in TEMPORARY)


def _entries(folder: Path) -> set[str]:
    """Names in a folder, without the temporary files that a killed process leaves."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise WeaverError(
            f"{folder}: is a file",
            why="a stage writes a folder of this name",
            fix="choose another --run-dir, or move the file away",
        )
    return {path.name for path in folder.iterdir() if not _is_temporary(path)}


def _refusal(folder: Path, request: StageRequest, existing: StageRequest) -> WeaverError:
    differences = request.differences(existing)
    if differences:
        return WeaverError(
            f"{folder}: made with another configuration: {'; '.join(differences)}",
            why="a run directory holds one result a stage",
            fix="use another --run-dir, or rerun the same command with --force",
        )
    changed = ", ".join(request.changed_inputs(existing)) or f"schema {existing.schema_version}"
    return WeaverError(
        f"{folder}: made from another {changed}",
        why=f"{changed} changed after {request.stage} ran",
        fix=f"rerun {request.stage}: {shell('rm', '-r', folder)}, then the same command",
    )


class StageRun:
    """A stage at work in its folder.

    Args:
        context: run directory, seed and flags.
        request: what is asked for.
        model: identity of the dense model.
        dtype: dtype of the computation, for the manifest.
        folder: the stage's folder, where it is not the one in the run directory.
    """

    def __init__(
        self,
        context: StageContext,
        request: StageRequest,
        model: ModelIdentity,
        dtype: str,
        *,
        folder: Path | None = None,
    ) -> None:
        self.context = context
        self.request = request.model_copy(
            update={"inputs": seen_from(context.run_dir, request.inputs)}
        )
        self.model = model
        self.dtype = dtype
        self.final = self.folder = folder or context.folder(request.stage)
        self.started = time.monotonic()
        self.command = stage_command(request.stage, context.run_dir)
        self.status = decide(self.final, request, force=context.force, command=self.command)
        if context.force and (self.final / MANIFEST).exists():
            self.folder = _new(self.final)
            self.status = _forced(self.folder, request, self.command)

    def begin(self, disk: int = 0) -> None:
        """Make the folder and note what is being made in it.

        Args:
            disk: bytes that the stage writes, at least.

        Raises:
            WouldRun: this is a dry run.
            WeaverError: the disk has no room for it.
        """
        if self.context.dry_run:
            raise WouldRun(self.status)
        require_disk(self.folder, disk)
        if self.status == "run":
            _clear(self.folder)
            write_json(self.folder / REQUEST, self.request.model_dump(mode="json"))
        for leftover in [path for path in self.folder.rglob(".*") if _is_temporary(path)]:
            leftover.unlink()

    def skipped(self) -> StageManifest:
        """The manifest of a complete stage, whose files are checked to be there and whole.

        Raises:
            WeaverError: a file is missing or cut off.
        """
        manifest = read_manifest(self.final, rebuild=self.command)
        check_outputs(self.final, manifest)
        if not self.context.dry_run:
            self.context.say(f"{self.request.stage}: complete, skipped")
        return manifest

    def layer_path(self, layer: int) -> Path:
        """File of one layer."""
        return layer_path(self.folder, layer)

    def has_layer(self, layer: int) -> bool:
        """``has_file`` of the layer's file."""
        return self.has_file(self.layer_path(layer))

    def has_file(self, path: Path) -> bool:
        """Whether a file of tensors is there, and whole.

        Raises:
            WeaverError: the file is there, but damaged.
        """
        if not path.exists():
            return False
        check_tensors_file(
            path, rebuild=f"{shell('rm', path)}, then rerun {self.command} as before"
        )
        return True

    def finish(self, summary: Summary) -> StageManifest:
        """Digest every output and write the manifest; what was forced takes its place."""
        outputs = {name: file_digest(self.folder / name) for name in output_names(self.folder)}
        manifest = StageManifest(
            request=self.request,
            model=self.model,
            outputs=outputs,
            digest=outputs_digest(outputs),
            summary=summary.model_dump(mode="json"),
            dtype=self.dtype,
            device=str(self.context.device),
            seconds=round(time.monotonic() - self.started, 3),
            peak_memory_bytes=peak_memory_bytes(),
            versions=versions(),
            git_commit=git_commit(),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write_manifest(self.folder, manifest)
        settle(self.final)
        self.folder = self.final
        return manifest


def _new(folder: Path) -> Path:
    """Where a forced stage works beside the finished result that it is to replace."""
    return folder.with_name(f".{folder.name}.new")


def _forced(work: Path, request: StageRequest, command: str) -> Status:
    """Whether a forced stage goes on with what an interrupted one of the same request left."""
    try:
        status = decide(work, request, force=False, command=command)
    except WeaverError:
        # What another request left there; an error again if weaver did not make it.
        return decide(work, request, force=True, command=command)
    return "run" if status == "skip" else status


def settle(folder: Path) -> None:
    """Put a finished forced result into the place of the old one, which is removed last.

    Two renames: a kill between them leaves both results under other names, and the next command in
    the run directory, which calls this first, ends the exchange. An unfinished result stays.
    """
    new, old = _new(folder), folder.with_name(f".{folder.name}.old")
    with disk_errors(folder):
        if (new / MANIFEST).is_file():
            if folder.exists():
                _remove(old)
                folder.rename(old)
            new.rename(folder)
            sync_folder(folder.parent)
        if folder.exists():
            _remove(old)


def _remove(folder: Path) -> None:
    """Remove a result that was replaced; a folder without its request is somebody else's."""
    if (folder / REQUEST).is_file() and not folder.is_symlink():
        _clear(folder)
        (folder / REQUEST).unlink()
        folder.rmdir()


def _clear(folder: Path) -> None:
    """Empty a stage's folder so that a kill at any moment leaves a state that ``decide`` knows.

    The manifest goes first (the stage is no longer complete), the request stays last (the folder is
    weaver's own); the next request then replaces it.
    """
    if not folder.exists():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != REQUEST:
            path.unlink()
