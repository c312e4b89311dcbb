"""Finished stages as inputs of later ones: where they lie, and whether they are whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from weaver.artifacts.manifest import (
    CARD,
    MANIFEST,
    REQUEST,
    InputRef,
    StageManifest,
    outputs_digest,
    read_manifest,
)
from weaver.artifacts.store import check_tensors_file, file_digest
from weaver.errors import WeaverError, shell

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


def stage_command(stage: str, run_dir: Path) -> str:
    """The command that makes a stage, for error messages."""
    if stage == "export":
        return shell("weaver", "export", run_dir)
    model = ["MODEL"] if stage == "calibrate" else []
    return shell("weaver", stage, *model, "--run-dir", run_dir)


def remake_hint(paths: Sequence[Path], stage: str, folder: Path) -> str:
    """How to make damaged files of a finished stage again, with the stage's own settings.

    ``STAGE --force`` would do too, but with whatever settings the user then remembers to give.

    Args:
        paths: every damaged file: once the manifest is gone, nothing says what the others held.
        stage: its name.
        folder: of the stage.
    """
    return (
        f"{shell('rm', '-f', *paths, folder / MANIFEST)}, then rerun "
        f"{stage_command(stage, folder.parent)} "
        "or weaver run as before: only what is missing is made again"
    )


def layer_path(folder: Path, layer: int) -> Path:
    """File of one layer inside a stage's folder."""
    return folder / f"layer_{layer:03d}.safetensors"


def output_names(folder: Path) -> list[str]:
    """Names of a stage's outputs: every file but its records, its card and hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        str(name)
        for name in names
        if name.name not in (REQUEST, MANIFEST, CARD)
        and not any(part.startswith(".") for part in name.parts)
    )


def check_outputs(folder: Path, manifest: StageManifest) -> None:
    """Check that every output of a complete stage is there, tensor files at their full length.

    Raises:
        WeaverError: naming the file and how to make it again.
    """
    for name in manifest.outputs:
        path = folder / name
        if not path.is_file():
            raise WeaverError(
                f"{path}: missing",
                why="the stage is complete, so the file was removed afterwards",
                fix=_remake_damaged(folder, manifest),
            )
        if path.suffix == ".safetensors":
            try:
                check_tensors_file(path)
            except WeaverError as error:
                fix = _remake_damaged(folder, manifest)
                raise WeaverError(error.what, why=error.why, fix=fix) from error


def check_contents(folder: Path, manifest: StageManifest) -> None:
    """Check that the outputs of a complete stage are what it wrote: digests, and no file more.

    What a stage reads of another is checked here first. Otherwise a value that changed on the disk
    would become a part of every later result, under digests that agree.

    Raises:
        WeaverError: naming the file and how to make it again.
    """
    check_outputs(folder, manifest)
    if manifest.digest != outputs_digest(manifest.outputs):
        raise WeaverError(
            f"{folder / MANIFEST}: its digest is not that of the outputs it lists",
            why="the manifest changed after the stage was finished",
            fix=f"{shell('rm', '-r', folder)}, then rerun "
            f"{stage_command(manifest.request.stage, folder.parent)} or weaver run as before",
        )
    for name, digest in manifest.outputs.items():
        found = _known_digest(folder / name)
        if found != digest:
            raise WeaverError(
                f"{folder / name}: digest {found[:12]} instead of {digest[:12]}",
                why="the file changed after the stage was finished",
                fix=_remake_damaged(folder, manifest),
            )
    for name in output_names(folder):
        if name not in manifest.outputs:
            raise WeaverError(
                f"{folder / name}: not an output of {manifest.request.stage}",
                why="the manifest does not list it, and what it does not list is not checked",
                fix=shell("mv", folder / name, "ELSEWHERE"),
            )


def _remake_damaged(folder: Path, manifest: StageManifest) -> str:
    """The advice for every file that is missing or has another digest."""
    damaged = [
        folder / name
        for name, digest in manifest.outputs.items()
        if not (folder / name).is_file() or _known_digest(folder / name) != digest
    ]
    return remake_hint(damaged, manifest.request.stage, folder)


_DIGESTS: dict[tuple[Path, int, int, int], str] = {}


def _known_digest(path: Path) -> str:
    """Digest of a file, computed once per process while size, time and inode stay the same."""
    found = path.stat()
    key = (path.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)
    if key not in _DIGESTS:
        try:
            _DIGESTS[key] = file_digest(path)
        # Of a file that is no longer one of tensors; it has another digest in any case.
        except ValueError:
            return "none"
    return _DIGESTS[key]


def finished_stage(folder: Path, stage: str) -> tuple[StageManifest, InputRef]:
    """Manifest of a finished parent stage and the reference to it.

    Raises:
        WeaverError: the parent has not finished, one of its files is damaged, or what it was made
            from has changed since.
    """
    command = stage_command(stage, folder.parent)
    if not (folder / MANIFEST).exists():
        raise WeaverError(
            f"{folder}: no finished {stage} stage",
            why=f"this stage reads what {stage} writes",
            fix=command,
        )
    manifest = read_manifest(folder, rebuild=command)
    if manifest.request.stage != stage:
        raise WeaverError(
            f"{folder}: is a {manifest.request.stage} stage, not {stage}",
            why="the manifest says so",
            fix=f"name the folder that {command} wrote",
        )
    check_contents(folder, manifest)
    _check_not_outdated(folder, manifest)
    return manifest, InputRef(path=str(folder.resolve()), digest=manifest.digest)


def seen_from(run_dir: Path, inputs: dict[str, InputRef]) -> dict[str, InputRef]:
    """The same references with stage folders relative to the run directory that records them.

    A run directory, or several that share a calibration, can then be moved as a whole.
    """
    return {
        name: ref.model_copy(update={"path": os.path.relpath(ref.path, run_dir.resolve())})
        if name in STAGE_FOLDERS
        else ref
        for name, ref in inputs.items()
    }


def _check_not_outdated(folder: Path, manifest: StageManifest) -> None:
    stage = manifest.request.stage
    for name, ref in manifest.request.inputs.items():
        source = (folder.parent / ref.path).resolve()
        if name not in STAGE_FOLDERS or not (source / MANIFEST).exists():
            continue
        command = stage_command(name, source.parent)
        if read_manifest(source, rebuild=command).digest != ref.digest:
            raise WeaverError(
                f"{folder}: made from another {name} than {source} holds now",
                why=f"{name} ran again after {stage}",
                fix=f"rerun {stage}: {shell('rm', '-r', folder)}, then "
                f"{stage_command(stage, folder.parent)} or weaver run as before",
            )
