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

from pydantic import ValidationError

from weaver.artifacts.manifest import (
    CARD,
    MANIFEST,
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
from weaver.artifacts.store import check_tensors_file, file_digest, read_json, write_json
from weaver.artifacts.summaries import Summary
from weaver.errors import WeaverError
from weaver.rundir.stage_folders import (
    STAGE_FOLDERS,
    check_outputs,
    layer_path,
    seen_from,
    stage_command,
)

REQUEST = "stage.json"
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


def decide(
    folder: Path, request: StageRequest, *, force: bool, command: str | None = None
) -> Status:
    """Decide from the stage's folder whether a request has to run, to resume or to be skipped.

    Args:
        folder: the stage's folder.
        request: what is asked for.
        force: throw away what the folder holds.
        command: what makes the stage, for messages; by default that of the folder's run directory.

    Raises:
        WeaverError: the folder holds another result (its configuration or its parents differ), or
            files that weaver did not write.
    """
    found = _entries(folder)
    if not found:
        return "run"
    command = command or stage_command(request.stage, folder.parent)
    if REQUEST not in found and MANIFEST not in found:
        raise WeaverError(
            f"{folder}: holds files, but no {REQUEST}",
            why="weaver neither writes into a folder that it did not make nor removes it",
            fix="choose another --run-dir, or move the folder away",
        )
    if force or found == {REQUEST}:
        # A stage that stopped before its first output holds nothing that could be lost.
        return "run"
    complete = (folder / MANIFEST).exists()
    existing = (
        read_manifest(folder, rebuild=command).request
        if complete
        else _read_request(folder / REQUEST, command)
    )
    if existing.fingerprint == request.fingerprint:
        return "skip" if complete else "resume"
    raise _refusal(folder, request, existing)


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
        fix=f"rerun {request.stage}: rm -r {folder}, then the same command",
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
        self.folder = folder or context.folder(request.stage)
        self.started = time.monotonic()
        self.command = stage_command(request.stage, context.run_dir)
        self.status = decide(self.folder, request, force=context.force, command=self.command)

    def begin(self) -> None:
        """Make the folder and note what is being made in it.

        Raises:
            WouldRun: this is a dry run.
        """
        if self.context.dry_run:
            raise WouldRun(self.status)
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
        manifest = read_manifest(self.folder, rebuild=self.command)
        check_outputs(self.folder, manifest)
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
        check_tensors_file(path, rebuild=f"rm {path}, then rerun {self.command} as before")
        return True

    def finish(self, summary: Summary) -> StageManifest:
        """Digest every output and write the manifest."""
        names = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.is_file() and path.name not in (REQUEST, MANIFEST, CARD)
        )
        outputs = {name: file_digest(self.folder / name) for name in names}
        manifest = StageManifest(
            request=self.request,
            model=self.model,
            outputs=outputs,
            digest=outputs_digest(outputs),
            summary=summary.model_dump(mode="json"),
            dtype=self.dtype,
            seconds=round(time.monotonic() - self.started, 3),
            peak_memory_bytes=peak_memory_bytes(),
            versions=versions(),
            git_commit=git_commit(),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        write_manifest(self.folder, manifest)
        return manifest


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
