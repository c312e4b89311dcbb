"""``finetune``: a short training of the converted model."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from weaver.artifacts.manifest import InputRef, StageManifest, StageRequest
from weaver.artifacts.store import disk_errors, values_digest
from weaver.config import FinetuneConfig
from weaver.data.packing import windows
from weaver.data.sources import parse_data_spec, read_documents
from weaver.models.loading import load_model
from weaver.models.writing import Part, parse_size, write_shards
from weaver.stages.card import write_card
from weaver.stages.converted import ConvertedModel, companions, open_converted
from weaver.stages.runner import StageContext, StageRun
from weaver.training.checkpoint import remove_checkpoints
from weaver.training.loop import TrainingReport
from weaver.training.loop import finetune as train

STAGE = "finetune"
CHECKPOINTS = "checkpoints"


def finetune(context: StageContext, config: FinetuneConfig) -> StageManifest:
    """Train the assembled model for some steps and write it to ``finetune/model``.

    Training runs in float32 whatever the stored dtype is: 16-bit weights would swallow small
    updates. The result is stored in the dtype of the assembled model.

    Args:
        context: run directory, seed, progress, data folder.
        config: text, steps, learning rates.

    Raises:
        WeaverError: no finished conversion, no such data, or a loss that is not finite.
    """
    converted = open_converted(context, finetuned=False)
    windows_WT = _windows(context, config, converted)
    data = InputRef(path=", ".join(config.data), digest=values_digest({"windows_WT": windows_WT}))
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=config.model_dump(mode="json"),
        inputs={"assemble": converted.ref, "data": data},
    )
    run = StageRun(context, request, converted.manifest.model, converted.manifest.dtype)
    if run.status == "skip":
        return run.skipped()
    run.begin()
    model = load_model(converted.folder, torch.float32)
    with context.progress(STAGE, config.steps) as advance:
        report = train(
            model,
            windows_WT,
            config,
            seed=context.seed,
            checkpoint_dir=run.folder / CHECKPOINTS,
            on_step=lambda step, loss: advance(f"step {step}, loss {loss:.3f}"),
        )
    _write_model(converted, model, run, request.config)
    remove_checkpoints(run.folder / CHECKPOINTS)
    return run.finish(_summary(report))


def _windows(context: StageContext, config: FinetuneConfig, converted: ConvertedModel) -> Tensor:
    documents = [
        document
        for text in config.data
        for document in read_documents(parse_data_spec(text).location, context.data_dir)
    ]
    tokenizer = converted.dense.tokenizer()
    return windows(documents, tokenizer, sequence_length=config.sequence_length, limit=None)


def _write_model(
    converted: ConvertedModel, model: PreTrainedModel, run: StageRun, settings: dict[str, Any]
) -> None:
    """The trained weights next to the assembled model's tokenizer, with the training's recipe."""
    folder = run.folder / "model"
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for path in companions(converted.folder):
            shutil.copyfile(path, folder / path.name)
    dtype: torch.dtype = getattr(torch, run.dtype)
    tied = set(model.all_tied_weights_keys)
    state = {k: v.detach().to(dtype) for k, v in model.state_dict().items() if k not in tied}
    parts = [_part(name, tensor) for name, tensor in state.items()]
    limit = parse_size(converted.manifest.request.config["max_shard_size"])
    write_shards(folder, parts, limit, lambda _name: None)
    config = AutoConfig.from_pretrained(converted.folder)
    config.weaver["recipe"]["finetune"] = settings
    config.save_pretrained(folder)
    write_card(folder, converted.account(), config.weaver["recipe"])


def _part(name: str, tensor: Tensor) -> Part:
    return Part({name: tensor.numel() * tensor.itemsize}, lambda: {name: tensor})


def _summary(report: TrainingReport) -> dict[str, Any]:
    return {
        "losses": list(report.losses),
        "tokens": report.tokens,
        "seconds": round(report.seconds, 3),
        "resumed_from": report.resumed_from,
    }
