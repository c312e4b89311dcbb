"""Fine-tuning of a converted model in phases: AdamW, a guard, resumable bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.config.finetuning import FinetuneConfig, PhaseConfig
from weaver.errors import WeaverError
from weaver.training.checkpoint import Progress, read_checkpoint, windows_digest
from weaver.training.dense import require_softmax_weights
from weaver.training.guard import Evaluation, Guard
from weaver.training.phase import changed_names, enter_phase
from weaver.training.presets import resolve_phases
from weaver.training.trainer import NotFiniteError, StepReport, Trainer
from weaver.training.workers import Workers

# What this says about the data is in the digest of the windows.
_NOT_SETTINGS = {"sequence_length"}
_GUARD_SETTINGS = {
    *("eval_data", "eval_windows", "eval_sequence_length"),
    *("evaluate_every", "best_by", "patience"),
}


class DivergedError(WeaverError):
    """A loss or gradient that is not finite; the model holds the best weights, if there is a guard.

    Args:
        what, why, fix: as of ``WeaverError``.
        best: the evaluation of the weights that the model holds now; None without a guard.
    """

    def __init__(self, what: str, *, why: str, fix: str, best: Evaluation | None) -> None:
        super().__init__(what, why=why, fix=fix)
        self.best = best


@dataclass(frozen=True)
class TrainingReport:
    """Record of a training: losses, tokens, seconds, steps and evaluations.

    Args:
        losses: loss of every step in nats per token, before that step's update.
        tokens: tokens read, the sum over the phases of steps * batch size * T.
        seconds: time spent in steps, that of interrupted runs up to their checkpoint counted in.
        resumed_from: steps that were taken over from a checkpoint.
        phase_steps: steps done in each phase.
        evaluations: what the guard saw.
        best: the evaluation of the weights that the model holds now; None without a guard.
    """

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    resumed_from: int
    phase_steps: tuple[int, ...]
    evaluations: tuple[Evaluation, ...] = ()
    best: Evaluation | None = None


def finetune(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    config: FinetuneConfig,
    *,
    seed: int,
    checkpoint_dir: Path,
    teacher: PreTrainedModel | None = None,
    guard: Guard | None = None,
    workers: Workers | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> TrainingReport:
    """Train a model in place on packed windows of tokens, phase by phase.

    Matrix products run in the workers' precision, gradients and updates in float32. With several
    workers each reads its part of every batch, gradients are added up, and the steps are those of
    one worker within rounding (dropout draws other masks).

    In each phase AdamW with betas (0.9, 0.95), gradients clipped to norm 1, the learning rates
    scaled by ``learning_rate_factor``; router scales have their own rate. After every step the
    balance bias of every router moves by ``balance_update`` toward equal load. A phase starts with
    a new optimizer, from the best weights so far, and adapters are merged when it ends.

    A checkpoint found in ``checkpoint_dir`` is continued, and the weights at the end are those of
    an undisturbed run, bit for bit, on the same machine with the same thread count: batches and
    random numbers (dropout) depend on the seed and the step alone, and what the guard decides on
    its evaluations, which are in the checkpoint.

    Master weights are the model's own: load it in float32 and cast when saving. In bfloat16 most
    updates at usual rates are smaller than half a unit in the last place and would be lost.

    Args:
        model: the model, in float32; left in eval mode, with the frozen parameters frozen. It moves
            to the workers' device, or stays where it is if they divide its weights.
        windows: for each phase token ids without padding, integer, (W, T).
        config: phases, rates and the rest.
        seed: order of the windows, adapters and dropout, not negative.
        checkpoint_dir: where checkpoints and best weights lie; the caller removes them when the
            result is saved.
        teacher: the dense model, for the objective ``distill``.
        guard: evaluates the model on the way, and the best weights are the result; without one the
            last weights are.
        workers: the processes that train together, each with the same arguments; this one alone
            if left out.
        on_step: called after each step and its checkpoint.
        on_evaluation: called after each evaluation.

    Returns:
        The report, over all steps.

    Raises:
        ValueError: windows that are not (W, T) with T > 1 or not one for each phase, trained
            weights below float32, or no teacher to distil from.
        WeaverError: nothing to train, or an unusable checkpoint.
        DivergedError: a loss or gradient that is not finite.

    Source: CMoE, arXiv:2502.04416, fine-tuning (Adam betas, router scale rate, balance bias).
    """
    workers = workers or Workers.join()
    phases = resolve_phases(config)
    _check_inputs(phases, windows, teacher)
    if any(phase.temperature is not None for phase in phases):
        require_softmax_weights(model)
    settings = _settings(config, phases, windows, seed)
    settings["precision"] = workers.precision_name
    found = read_checkpoint(checkpoint_dir, settings)
    start = found.progress if found else Progress()
    best: Evaluation | None = None
    trainer = Trainer(
        model,
        seed,
        checkpoint_dir,
        settings=settings,
        checkpoint_every=config.checkpoint_every,
        names=changed_names(model, phases),
        teacher=teacher,
        guard=guard,
        on_step=on_step,
        on_evaluation=on_evaluation,
        workers=workers,
        progress=start,
        saved_best=guard.best(start.evaluations).step if guard and start.evaluations else None,
    )
    with ExitStack() as stack:
        stack.callback(model.eval)
        # Dropout draws from a seed per step; the caller's random state is given back at the end.
        stack.enter_context(torch.random.fork_rng(_cuda_devices(workers.device)))
        for index in range(start.phase, len(phases)):
            if index > trainer.progress.phase:
                trainer.next_phase()
            tuned = enter_phase(model, phases, index, seed=seed, workers=workers)
            if found is not None:
                found.load(tuned.state)
                found = None
            try:
                trainer.run_phase(tuned, phases[index], windows[index])
            except NotFiniteError as error:
                tuned.leave(trainer.names)
                raise _diverged(error, trainer.restore_best(), config, phases, index) from error
            tuned.leave(trainer.names)
            best = trainer.restore_best()
    progress = trainer.progress
    sizes = [phase.batch_size * each.shape[1] for phase, each in zip(phases, windows, strict=True)]
    return TrainingReport(
        losses=progress.losses,
        tokens=sum(n * size for n, size in zip(progress.phase_steps, sizes, strict=True)),
        seconds=progress.seconds,
        resumed_from=start.step,
        phase_steps=progress.phase_steps,
        evaluations=progress.evaluations,
        best=best,
    )


def _diverged(
    error: NotFiniteError,
    best: Evaluation | None,
    config: FinetuneConfig,
    phases: Sequence[PhaseConfig],
    index: int,
) -> DivergedError:
    """The error for the user."""
    rate = phases[index].learning_rate
    if config.phases is None:
        fix = f"rerun with --force --set finetune.learning_rate={rate / 4:g}"
    else:
        fix = f"set learning_rate: {rate / 4:g} in phase {index + 1} and rerun with --force"
    return DivergedError(
        f"{error} of {phases[index].steps}",
        why=f"the training diverged at learning rate {rate:g}",
        fix=fix,
        best=best,
    )


def _settings(
    config: FinetuneConfig, phases: Sequence[PhaseConfig], windows: Sequence[Tensor], seed: int
) -> dict[str, Any]:
    """Collect the settings that a resumed training must share with its checkpoint."""
    settings: dict[str, Any] = {"seed": seed}
    settings |= config.model_dump(mode="json", include=_GUARD_SETTINGS)
    for number, (phase, windows_WT) in enumerate(zip(phases, windows, strict=True), start=1):
        values = phase.model_dump(mode="json", exclude=_NOT_SETTINGS)
        values["windows"] = windows_digest(windows_WT)
        prefix = f"phase {number} " if len(phases) > 1 else ""
        settings |= {f"{prefix}{key}": value for key, value in values.items()}
    return settings


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def _check_inputs(
    phases: Sequence[PhaseConfig], windows: Sequence[Tensor], teacher: PreTrainedModel | None
) -> None:
    if len(windows) != len(phases):
        raise ValueError(f"{len(windows)} tensors of windows for {len(phases)} phases")
    for windows_WT in windows:
        if windows_WT.ndim != 2 or windows_WT.shape[0] < 1 or windows_WT.shape[1] < 2:
            raise ValueError(f"windows of shape {tuple(windows_WT.shape)}, not (W, T) with T > 1")
        if windows_WT.is_floating_point():
            raise ValueError(f"windows of {windows_WT.dtype}, not token ids")
    if teacher is None and any(phase.objective == "distill" for phase in phases):
        raise ValueError("the objective distill needs a teacher")
