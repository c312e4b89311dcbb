"""Finished stages as inputs of later ones: where they lie, and whether they are whole."""

from __future__ import annotations

import os
from pathlib import Path

from weaver.artifacts.manifest import MANIFEST, InputRef, StageManifest, read_manifest
from weaver.artifacts.store import check_tensors_file
from weaver.errors import WeaverError

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
        return f"weaver export {run_dir}"
    name = "calibrate MODEL" if stage == "calibrate" else stage
    return f"weaver {name} --run-dir {run_dir}"


def remake_hint(path: Path, stage: str, folder: Path) -> str:
    """How to make one damaged file of a finished stage again, with the stage's own settings.

    ``STAGE --force`` would do too, but with whatever settings the user then remembers to give.
    """
    return (
        f"rm -f {path} {folder / MANIFEST}, then rerun {stage_command(stage, folder.parent)} "
        "or weaver run as before: only what is missing is made again"
    )


def layer_path(folder: Path, layer: int) -> Path:
    """File of one layer inside a stage's folder."""
    return folder / f"layer_{layer:03d}.safetensors"


def check_outputs(folder: Path, manifest: StageManifest) -> None:
    """Check that every output of a complete stage is there, tensor files at their full length.

    Raises:
        WeaverError: naming the file and how to make it again.
    """
    for name in manifest.outputs:
        path = folder / name
        remake = remake_hint(path, manifest.request.stage, folder)
        if not path.is_file():
            raise WeaverError(
                f"{path}: missing",
                why="the stage is complete, so the file was removed afterwards",
                fix=remake,
            )
        if path.suffix == ".safetensors":
            check_tensors_file(path, rebuild=remake)


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
    check_outputs(folder, manifest)
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
                fix=f"rerun {stage}: rm -r {folder}, then "
                f"{stage_command(stage, folder.parent)} or weaver run as before",
            )
