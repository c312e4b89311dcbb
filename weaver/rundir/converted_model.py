"""Opening the converted model of a run: the assembled one, or the fine-tuned one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from weaver.artifacts.manifest import MANIFEST, InputRef, StageManifest
from weaver.config.sections import DtypeName
from weaver.models.accounting import LayerShape, ModelAccount
from weaver.models.checkpoint import Checkpoint
from weaver.models.device import CPU
from weaver.models.hf import register
from weaver.models.intake import read_config
from weaver.models.loading import load_model
from weaver.models.sites import read_shape, site_shapes
from weaver.rundir.inputs import open_model
from weaver.rundir.stage_folders import STAGE_FOLDERS, finished_stage
from weaver.rundir.stage_run import StageContext


@dataclass(frozen=True)
class ConvertedModel:
    """A converted model on disk and the dense one it came from.

    Args:
        folder: the Hugging Face model folder.
        stage: "assemble" or "finetune".
        manifest: of that stage.
        ref: reference to that stage.
        dense: the dense model.
        device: where models are loaded.
    """

    folder: Path
    stage: str
    manifest: StageManifest
    ref: InputRef
    dense: Checkpoint
    device: torch.device = CPU

    def shapes(self) -> list[LayerShape]:
        """Shape of every converted FFN, from ``config.json``."""
        register()
        config = read_config(self.folder)
        return site_shapes([read_shape(entry) for entry in config.weaver["layers"]])

    def recipe(self) -> dict[str, Any]:
        """The resolved configuration of every stage that made the model, from ``config.json``."""
        register()
        recipe: dict[str, Any] = read_config(self.folder).weaver["recipe"]
        return recipe

    def account(self) -> ModelAccount:
        """Return the parameters and FLOPs of the dense and of the converted model."""
        return account_of(self.dense, self.shapes())

    def load(self, dtype: DtypeName) -> PreTrainedModel:
        """The converted model."""
        return load_model(self.folder, self.dtype(dtype), device=self.device)

    def load_dense(self, dtype: DtypeName) -> PreTrainedModel:
        """The dense model, in the same dtype."""
        return load_model(
            self.dense.folder,
            self.dtype(dtype),
            device=self.device,
            trust_remote_code=self.dense.model.trust_remote_code,
        )

    def dtype(self, name: DtypeName) -> torch.dtype:
        """``auto`` is the dense checkpoint's dtype for both, so that they are compared fairly."""
        return self.dense.resolve_dtype(name)


def open_converted(context: StageContext, *, finetuned: bool = True) -> ConvertedModel:
    """The fine-tuned model if the run has one and it is wanted, else the assembled one.

    Raises:
        WeaverError: neither has finished, or the dense model is gone.
    """
    stage, folder, manifest, ref = _newest(context, finetuned=finetuned)
    dense = open_model(manifest.model, trust_remote_code=context.trust_remote_code)
    return ConvertedModel(folder, stage, manifest, ref, dense, context.device)


def converted_folder(run_dir: Path) -> Path:
    """Folder of the model that ``open_converted`` opens; the dense one may be gone.

    Raises:
        WeaverError: the run has no finished model.
    """
    return _newest(StageContext(run_dir), finetuned=True)[1]


def model_folder_of(run_dir: Path, *, finetuned: bool) -> Path:
    """Model folder of a run: the one that ``finetune`` wrote, or ``assemble``."""
    stage = "finetune" if finetuned else "assemble"
    return run_dir / STAGE_FOLDERS[stage] / ("model" if finetuned else "")


def _newest(context: StageContext, *, finetuned: bool) -> tuple[str, Path, StageManifest, InputRef]:
    stage = "assemble"
    if finetuned and (context.folder("finetune") / MANIFEST).exists():
        stage = "finetune"
    manifest, ref = finished_stage(context.folder(stage), stage)
    folder = model_folder_of(context.run_dir, finetuned=stage == "finetune")
    return stage, folder, manifest, ref


def account_of(checkpoint: Checkpoint, shapes: list[LayerShape]) -> ModelAccount:
    """Return parameters and FLOPs of a model and of its conversion into shapes, one per FFN."""
    first = checkpoint.dense_shape(0)
    return ModelAccount(
        hidden_size=checkpoint.hidden_size,
        intermediate_size=checkpoint.intermediate_size,
        total_dense_parameters=checkpoint.total_parameters(),
        layers=shapes,
        dense_gate_bias=first.gate_bias,
        dense_up_bias=first.up_bias,
        dense_output_bias=first.output_bias,
        sites=checkpoint.dense_ffns() if checkpoint.is_moe else (),
        outer_flops=checkpoint.outer_flops(),
    )
