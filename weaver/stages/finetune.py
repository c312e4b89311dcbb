"""``finetune``: a short training of the converted model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.artifacts.dtypes import DTYPES
from weaver.artifacts.manifest import InputRef, StageManifest, StageRequest
from weaver.artifacts.store import disk_errors, values_digest
from weaver.artifacts.summaries import EvaluationPoint, FinetuneSummary, PhaseSummary
from weaver.config.finetuning import FinetuneConfig, PhaseConfig
from weaver.data.holdout import hold_out
from weaver.data.packing import read_windows, separators
from weaver.errors import WeaverError, require_extra, shell
from weaver.kernels.machine import cpu_features
from weaver.models.device import CPU
from weaver.models.intake import check_windows, read_config
from weaver.models.writing import (
    Part,
    copy_companions,
    parse_size,
    save_config,
    weights_bytes,
    write_shards,
)
from weaver.report.tracking import check_tracker, tracking
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.stage_run import StageContext, StageRun
from weaver.stages.model_card import write_card
from weaver.stages.training_job import CHECKPOINTS, RescuedError, TrainingJob
from weaver.training.checkpoint import remove_checkpoints
from weaver.training.loop import DivergedError, TrainingReport
from weaver.training.presets import resolve_phases, resolved_config
from weaver.training.workers import PRECISIONS, Workers

STAGE = "finetune"
MODEL = "model"


def finetune(
    context: StageContext,
    config: FinetuneConfig,
    *,
    report_to: str | None = None,
    shard: bool = False,
) -> StageManifest:
    """Train the assembled model for some steps and write its best weights to ``finetune/model``.

    Training runs in float32 whatever the stored dtype is: 16-bit weights would swallow small
    updates. The result is stored in the dtype of the assembled model. The dense model, which the
    held-out evaluations compare with and ``distill`` learns from, is loaded beside it. Unless
    ``eval_data`` names a text, the evaluations read windows of ``data`` that are not trained on.

    Several processes (``torchrun``, ``accelerate launch``) train together; all of them run this,
    and the main one alone writes.

    Args:
        context: run directory, seed, progress, data folder.
        config: text, phases, learning rates, evaluations.
        report_to: a tracker for the curves, see ``weaver.report.tracking``.
        shard: divide the weights among the processes; what comes out differs by rounding alone, and
            is not recorded, as their number is not.

    Raises:
        WeaverError: no finished conversion, no such data, or a loss that is not finite; then the
            best weights until there are written, but the stage is not complete.
    """
    if report_to is not None:
        check_tracker(report_to)
    # In main memory: the workers place what they read, each on its own device.
    converted = replace(open_converted(context, finetuned=False), device=CPU)
    tokenizer = converted.dense.tokenizer()
    phases = resolve_phases(config)
    if any(phase.lora is not None and "attention" in phase.lora.targets for phase in phases):
        require_extra("peft", "finetune", "trainable: lora of the attention")
    workers = Workers.join(_precision(config, context.device), sharded=shard, device=context.device)
    _check_batches(phases, workers)
    texts, held_out_WT = _texts(context, config, phases, tokenizer)
    for ids_WT in (*texts.values(), held_out_WT):
        check_windows(converted.dense.config, ids_WT, what=converted.dense.model.path)
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=resolved_config(config, phases, workers.precision_name),
        inputs={
            "assemble": converted.ref,
            "data": _data_ref(config.data, texts),
            "eval_data": _data_ref(
                config.eval_data or ["part of data"], {config.eval_sequence_length: held_out_WT}
            ),
        },
    )
    run = StageRun(context, request, converted.manifest.model, converted.manifest.dtype)
    if run.status == "skip":
        return run.skipped()
    job = TrainingJob(converted, config, phases, texts, held_out_WT, workers)
    workers.wait()  # until all have seen what is on disk before this run
    if not workers.is_main:
        job.train(context, run.folder, lambda _values, _step: None)
        workers.wait()  # for the manifest
        return run.skipped()
    run.begin(disk=weights_bytes(converted.folder))
    try:
        with tracking(report_to, context.run_dir.name, _logs(context), request.config) as log:
            model, report = job.train(context, run.folder, log)
    except RescuedError as rescued:
        _write_model(converted, rescued.model, run)
        raise _with_folder(rescued.error, run.folder / MODEL) from rescued.error
    _write_model(converted, model, run)
    remove_checkpoints(run.folder / CHECKPOINTS)
    manifest = run.finish(_summary(report, phases))
    workers.wait()
    return manifest


def _precision(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where it is fast, unless the configuration says otherwise."""
    if config.precision != "auto":
        return PRECISIONS[config.precision]
    fast = device.type == "cuda" or "bf16" in cpu_features()
    return torch.bfloat16 if fast else torch.float32


def _check_batches(phases: Sequence[PhaseConfig], workers: Workers) -> None:
    smallest = min(phase.batch_size for phase in phases)
    if smallest < workers.count:
        raise WeaverError(
            f"batch_size={smallest} for {workers.count} processes",
            why="every process reads at least one window of a batch",
            fix=f"--batch-size {workers.count}",
        )


def _logs(context: StageContext) -> Path:
    """Beside the stage's folder: what trackers write is no output of the stage."""
    return context.run_dir / "logs"


def _texts(
    context: StageContext,
    config: FinetuneConfig,
    phases: Sequence[PhaseConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[int, Tensor], Tensor]:
    """Windows to train on by their length, and the guard's."""
    lengths = sorted({phase.sequence_length for phase in phases})
    read = partial(read_windows, tokenizer=tokenizer, data_dir=context.data_dir)
    texts = {n: read(config.data, sequence_length=n, limit=None) for n in lengths}
    length, count = config.eval_sequence_length, config.eval_windows
    if config.eval_data is not None:
        return texts, read(config.eval_data, sequence_length=length, limit=count)
    text_WT = read(config.data, sequence_length=length, limit=None)
    prefix = len(separators(tokenizer)[0])
    held_out_WT, rest = hold_out(text_WT, count, texts, prefix=prefix)
    return rest, held_out_WT


def _data_ref(data: Sequence[str], windows_by_length: dict[int, Tensor]) -> InputRef:
    digest = values_digest({f"windows_{n}": ids_WT for n, ids_WT in windows_by_length.items()})
    return InputRef(path=", ".join(data), digest=digest)


def _with_folder(error: DivergedError, folder: Path) -> WeaverError:
    """The same error, with the place of the best weights."""
    assert error.best is not None
    return WeaverError(
        f"{error.what}; the best weights, of step {error.best.step} with a held-out KL of "
        f"{error.best.held_out.kl:.4f}, are in {folder}",
        why=error.why,
        fix=f"{error.fix}; {shell('cp', '-r', folder, 'ELSEWHERE')} first to keep it, since "
        "--force makes it anew",
    )


def _write_model(converted: ConvertedModel, model: PreTrainedModel, run: StageRun) -> None:
    """The trained weights next to the assembled model's tokenizer, with the training's recipe."""
    folder = run.folder / MODEL
    with disk_errors(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        copy_companions(converted.folder, folder)
    dtype: torch.dtype = DTYPES[run.dtype]
    tied = set(model.all_tied_weights_keys)
    state = {k: v.detach().to(dtype) for k, v in model.state_dict().items() if k not in tied}
    parts = [_part(name, tensor) for name, tensor in state.items()]
    limit = parse_size(converted.manifest.request.config["max_shard_size"])
    write_shards(folder, parts, limit, lambda _name: None)
    config = read_config(converted.folder)
    config.weaver["recipe"]["finetune"] = run.request.config
    save_config(config, folder)
    write_card(folder, converted.account(), config.weaver["recipe"], converted.dense.folder)


def _part(name: str, tensor: Tensor) -> Part:
    return Part({name: tensor.numel() * tensor.itemsize}, lambda: {name: tensor})


def _summary(report: TrainingReport, phases: Sequence[PhaseConfig]) -> FinetuneSummary:
    assert report.best is not None
    return FinetuneSummary(
        losses=report.losses,
        tokens=report.tokens,
        seconds=round(report.seconds, 3),
        resumed_from=report.resumed_from,
        phases=tuple(
            PhaseSummary(
                trainable=phase.trainable,
                objective=phase.objective,
                steps=phase.steps,
                steps_done=done,
            )
            for phase, done in zip(phases, report.phase_steps, strict=True)
        ),
        evaluations=tuple(EvaluationPoint(**each.to_dict()) for each in report.evaluations),
        best_step=report.best.step,
    )
