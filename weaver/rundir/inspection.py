"""``inspect``: what a run directory holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver.artifacts.manifest import MANIFEST, REQUEST, StageManifest, read_manifest, read_request
from weaver.errors import WeaverError, shell
from weaver.rundir.stage_folders import (
    STAGE_FOLDERS,
    check_contents,
    check_outputs,
    stage_command,
)

EXPORTS = "export-*"


@dataclass(frozen=True)
class StageState:
    """One stage of a run directory.

    Args:
        stage: its name.
        folder: its folder.
        state: "complete", "unfinished" or "damaged".
        note: files so far, or what is damaged.
        manifest: of a complete stage.
        size: bytes on disk.
    """

    stage: str
    folder: Path
    state: str
    note: str
    manifest: StageManifest | None
    size: int

    def row(self) -> dict[str, Any]:
        """The state as values of JSON, with the summary of a complete stage."""
        row: dict[str, Any] = {"stage": self.stage, "folder": str(self.folder)}
        if self.manifest is not None:
            row = stage_row(self.stage, self.folder, self.manifest)
        return row | {"state": self.state, "note": self.note, "bytes": self.size}


def stage_row(stage: str, folder: Path, manifest: StageManifest) -> dict[str, Any]:
    """A finished stage as values of JSON."""
    fields = {"digest", "seconds", "peak_memory_bytes", "finished_at", "summary"}
    values = manifest.model_dump(mode="json", include=fields)
    return {"stage": stage, "folder": str(folder), **values}


def inspect_run(run_dir: Path, *, verify: bool) -> list[StageState]:
    """The stages that a run directory holds, and the exports that lie in it.

    Args:
        run_dir: the run directory.
        verify: compute every file's digest again and compare; otherwise only lengths are checked.

    Raises:
        WeaverError: the folder does not exist or holds no stage.
    """
    folders = [(stage, run_dir / name) for stage, name in STAGE_FOLDERS.items()]
    folders += [("export", folder) for folder in sorted(run_dir.glob(EXPORTS))]
    states = [
        _inspect(stage, folder, verify=verify)
        for stage, folder in folders
        if (folder / REQUEST).exists() or (folder / MANIFEST).exists()
    ]
    if not states:
        raise WeaverError(
            f"{run_dir}: no run directory",
            why=f"a run directory holds one of the folders {', '.join(STAGE_FOLDERS.values())}",
            fix=shell("weaver", "convert", "MODEL", run_dir),
        )
    return states


def _inspect(stage: str, folder: Path, *, verify: bool) -> StageState:
    size = sum(_size(path) for path in folder.rglob("*"))
    if not (folder / MANIFEST).exists():
        layers = sum(path.name.startswith("layer_") for path in folder.iterdir())
        note = f"{layers} layers so far; rerun {stage_command(stage, folder.parent)}"
        return StageState(stage, folder, "unfinished", note, None, size)
    command = stage_command(stage, folder.parent)
    try:
        manifest = read_manifest(folder, rebuild=command)
        check_outputs(folder, manifest)
        if verify:
            check_contents(folder, manifest)
            _check_request(folder, manifest)
    except WeaverError as error:
        return StageState(stage, folder, "damaged", f"{error.what}; fix: {error.fix}", None, size)
    return StageState(stage, folder, "complete", "", manifest, size)


def _size(path: Path) -> int:
    """Bytes of a file; 0 for a folder, and for a temporary file that is gone by now."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def _check_request(folder: Path, manifest: StageManifest) -> None:
    """The manifest says what ``stage.json`` said before the stage began."""
    command = stage_command(manifest.request.stage, folder.parent)
    written = read_request(folder / REQUEST, command)
    if written.fingerprint != manifest.request.fingerprint:
        raise WeaverError(
            f"{folder / MANIFEST}: another request than {REQUEST} holds",
            why="one of the two changed after the stage was finished",
            fix=f"{shell('rm', '-r', folder)}, then rerun {command} or weaver run as before",
        )
