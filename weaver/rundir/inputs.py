"""Opening what earlier stages left: the chain partition > calibrate > model, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weaver.artifacts.affinity import Affinity
from weaver.artifacts.dtypes import DTYPES
from weaver.artifacts.manifest import InputRef, ModelIdentity, StageManifest
from weaver.artifacts.sensitivities import Sensitivities
from weaver.artifacts.store import read_record
from weaver.artifacts.summaries import CalibrateSummary, PartitionSummary, read_summary
from weaver.artifacts.types import Compensation, ExpertLayout, LayerProfile, Router
from weaver.config.sections import CalibrateConfig, ModelConfig, RouterConfig
from weaver.data.grouping import GroupWindows
from weaver.data.packing import PackedTokens
from weaver.errors import WeaverError, shell
from weaver.models.checkpoint import Checkpoint
from weaver.models.device import CPU
from weaver.rundir.stage_folders import finished_stage, layer_path

# Files of a calibration: its text, and what errors cost at its tokens.
TOKENS_FILE = "tokens.safetensors"
HELD_OUT_FILE = "held_out.safetensors"
SENSITIVITY_FILE = "sensitivities.safetensors"
# Folders of a sequential partition: its profiles, and the routers it propagated. Compensations lie
# in a folder beside the routers they belong to.
PROFILE_FOLDER = "profile"
ROUTER_FOLDER = "router"
COMPENSATION_FOLDER = "compensation"
# Folder of a partition by groups: how alike the groups prune the model.
AFFINITY_FOLDER = "affinity"


@dataclass(frozen=True)
class Calibration:
    """A finished calibrate stage and the model it belongs to."""

    folder: Path
    manifest: StageManifest
    ref: InputRef
    checkpoint: Checkpoint

    @property
    def config(self) -> CalibrateConfig:
        values = {k: v for k, v in self.manifest.request.config.items() if k != "dtype"}
        return CalibrateConfig.model_validate(values)

    @property
    def summary(self) -> CalibrateSummary:
        return read_summary(CalibrateSummary, self.manifest.summary)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.manifest.dtype]

    @property
    def identity(self) -> ModelIdentity:
        return self.manifest.model

    def profile(self, layer: int) -> LayerProfile:
        """Profile of one layer on the dense model's hidden states, on the device."""
        return read_record(layer_path(self.folder, layer), LayerProfile).to(self.checkpoint.device)


@dataclass(frozen=True)
class Partition:
    """A finished partition stage and its calibration."""

    folder: Path
    manifest: StageManifest
    ref: InputRef
    calibration: Calibration

    @property
    def summary(self) -> PartitionSummary:
        return read_summary(PartitionSummary, self.manifest.summary)

    @property
    def seed(self) -> int:
        """Root of its randomness."""
        return self.manifest.request.seed

    @property
    def sequential(self) -> bool:
        """Whether the layers were profiled behind converted layers."""
        return bool(self.manifest.request.config["sequential"])

    @property
    def propagated(self) -> RouterConfig | None:
        """The router configuration behind which a sequential partition split its layers."""
        values = self.manifest.request.config["propagate"]
        return RouterConfig.model_validate(values) if self.sequential else None

    def group_experts(self) -> Tensor | None:
        """The expert of each calibration group, (G,); None if the partition is not by groups."""
        path = affinity_path(self.folder)
        return read_record(path, Affinity).experts_G if path.exists() else None

    def layout(self, layer: int) -> ExpertLayout:
        """Layout of one layer."""
        return read_record(layer_path(self.folder, layer), ExpertLayout)

    def profile(self, layer: int) -> LayerProfile:
        """The profile that the layout was made from."""
        if not self.sequential:
            return self.calibration.profile(layer)
        profile = read_record(layer_path(self.folder / PROFILE_FOLDER, layer), LayerProfile)
        return profile.to(self.calibration.checkpoint.device)


def affinity_path(folder: Path) -> Path:
    """File of the affinity in a partition's folder."""
    return folder / AFFINITY_FOLDER / "affinity.safetensors"


def open_calibration(
    folder: Path, *, trust_remote_code: bool = False, device: torch.device = CPU
) -> Calibration:
    """Open a finished calibrate stage.

    Args:
        folder: of the stage.
        trust_remote_code, device: see ``open_model``.

    Raises:
        WeaverError: it has not finished, or its model or tokenizer has changed since.
    """
    manifest, ref = finished_stage(folder, "calibrate")
    known = manifest.model
    checkpoint = open_model(known, trust_remote_code=trust_remote_code, device=device)
    found = checkpoint.identity(known)
    for what, before, now in (
        ("model", known.digest, found.digest),
        ("tokenizer", known.tokenizer_digest, found.tokenizer_digest),
    ):
        if before != now:
            raise WeaverError(
                f"{folder}: profile of another {what}, digest {before[:12]} instead of {now[:12]}",
                why=f"the {what} in {known.folder} changed after the calibration",
                fix=shell(
                    *("weaver", "calibrate", known.path, "--run-dir", folder.parent, "--force")
                ),
            )
    return Calibration(folder, manifest, ref, checkpoint)


def read_packed_tokens(folder: Path) -> PackedTokens:
    """The packed tokens of a finished calibrate stage."""
    return read_record(folder / TOKENS_FILE, PackedTokens)


def read_held_out(folder: Path) -> GroupWindows:
    """The held-out windows of a finished calibrate stage that keeps groups apart."""
    return read_record(folder / HELD_OUT_FILE, GroupWindows)


def read_sensitivities(folder: Path) -> Sensitivities | None:
    """The sensitivities of a finished calibrate stage; None where it measured none."""
    path = folder / SENSITIVITY_FILE
    return read_record(path, Sensitivities) if path.exists() else None


def open_model(
    identity: ModelIdentity, *, trust_remote_code: bool = False, device: torch.device = CPU
) -> Checkpoint:
    """The dense model that an artifact was made from.

    Args:
        identity: as the artifact's manifest has it.
        trust_remote_code: whether this command may run the model's own code. The manifest does not
            decide it: a run directory may come from somebody else.
        device: of the layers that it hands out.

    Raises:
        WeaverError: the model was calibrated with code of its own, which this command may not run.
    """
    if identity.trust_remote_code and not trust_remote_code:
        raise WeaverError(
            f"{identity.folder}: calibrated with code of its own",
            why="a command runs code out of a model's folder only when it is told to",
            fix="--trust-remote-code, if you trust the model",
        )
    return Checkpoint(
        ModelConfig(path=identity.folder, trust_remote_code=identity.trust_remote_code), device
    )


def open_partition(
    folder: Path, *, trust_remote_code: bool = False, device: torch.device = CPU
) -> Partition:
    """Open a finished partition stage, and the calibration it names.

    Args:
        folder: of the stage.
        trust_remote_code, device: see ``open_model``.

    Raises:
        WeaverError: either has not finished, or the calibration changed after the partition.
    """
    manifest, ref = finished_stage(folder, "partition")
    named = manifest.request.inputs["calibrate"].path
    calibration = open_calibration(
        (folder.parent / named).resolve(), trust_remote_code=trust_remote_code, device=device
    )
    return Partition(folder, manifest, ref, calibration)


def read_router(folder: Path, layer: int, layout: ExpertLayout) -> Router | None:
    """Router of one layer; None for a static layer."""
    if layout.num_routed_experts == 0:
        return None
    return read_record(layer_path(folder, layer), Router)


def read_compensation(folder: Path, layer: int) -> Compensation | None:
    """Compensation of one layer, from the folder of build-router; None where it wrote none.

    ``parent`` has checked that the stage is complete, so a file that is not there was not written.
    """
    path = layer_path(folder / COMPENSATION_FOLDER, layer)
    return read_record(path, Compensation) if path.exists() else None
