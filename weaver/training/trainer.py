"""The steps of a phase: update, load balance, evaluation, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.config.finetuning import PhaseConfig
from weaver.errors import WeaverError
from weaver.training.balance import Balance, ExpertLoad, ExpertLoadCounter
from weaver.training.batches import batch_indices, step_seed
from weaver.training.checkpoint import Progress, save_checkpoint
from weaver.training.dense import routed_to_all
from weaver.training.guard import Evaluation, Guard, HeldOut, load_best, prune_best, save_best
from weaver.training.loss import training_loss
from weaver.training.optimizer import learning_rate_factor
from weaver.training.phase import PhaseModel, load_tensors
from weaver.training.sharding import clip_gradients
from weaver.training.workers import Workers

CLIP_NORM = 1.0


class NotFiniteError(Exception):
    """Says what of a step is not finite, and at which step of the phase."""


@dataclass(frozen=True)
class StepReport:
    """One step, for progress displays and trackers.

    Args:
        step: steps done, over all phases.
        loss: nats per token, before the step's update.
        learning_rate: of the weights, at this step.
        balance: how evenly the experts were used; None without routed experts.
        tokens_per_second: tokens of all processes over the time of this step.
    """

    step: int
    loss: float
    learning_rate: float
    balance: Balance | None
    tokens_per_second: float


@dataclass
class Trainer:
    """A training at work; ``progress`` moves with every step.

    With several processes each runs one, and only the main one writes.

    Args:
        model: the model.
        seed: order of the windows and dropout.
        folder: where checkpoints and best weights lie.
        settings: what a checkpoint must have been written with.
        checkpoint_every: steps between checkpoints, over all phases.
        names: tensors that any phase changes, by their names without adapters.
        teacher, guard, on_step, on_evaluation: as of ``weaver.training.loop.finetune``.
        workers: the processes that train together.
        progress: how far the training has come.
        saved_best: step of the best weights that the newest checkpoint refers to.
    """

    model: PreTrainedModel
    seed: int
    folder: Path
    settings: dict[str, Any]
    checkpoint_every: int
    names: list[str]
    teacher: PreTrainedModel | None
    guard: Guard | None
    on_step: Callable[[StepReport], None] | None
    on_evaluation: Callable[[Evaluation], None] | None
    workers: Workers
    progress: Progress
    saved_best: int | None

    def run_phase(self, tuned: PhaseModel, phase: PhaseConfig, windows_WT: Tensor) -> None:
        """The steps of a phase that are not done yet.

        Raises:
            NotFiniteError: a loss, gradient or evaluation is not finite.
            WeaverError: the untrained model cannot be evaluated, or the folder not be written.
        """
        if self.guard is not None and not self.progress.evaluations:
            # What fails here is none of the training's.
            self._note(self._evaluate(tuned, self.guard), tuned, self.guard)
        while not self._is_over(phase):
            report = self._step(tuned, phase, windows_WT)
            if self.guard is not None and self._is_due(self.guard, phase):
                self._note(self._measure(tuned, self.guard), tuned, self.guard)
            if self.progress.step % self.checkpoint_every == 0:
                self._save(tuned)
            if self.on_step is not None:
                self.on_step(report)

    def next_phase(self) -> None:
        """Note that the next phase begins here."""
        starts = (*self.progress.phase_starts, self.progress.step)
        self.progress = replace(self.progress, phase_starts=starts)

    def restore_best(self) -> Evaluation | None:
        """Put the best weights so far into the model, which has no adapters now.

        Returns:
            Their evaluation; None without a guard, which leaves the model as it is.
        """
        if self.guard is None:
            return None
        best = self.guard.best(self.progress.evaluations)
        self.workers.wait()  # for the file that the main process writes
        tensors = load_best(self.folder, best.step)
        load_tensors(self.model, {name: tensors[name] for name in self.names})
        return best

    def _is_over(self, phase: PhaseConfig) -> bool:
        if self.progress.phase_step >= phase.steps:
            return True
        guard, progress = self.guard, self.progress
        return guard is not None and guard.exhausted(progress.evaluations, progress.phase)

    def _is_due(self, guard: Guard, phase: PhaseConfig) -> bool:
        step = self.progress.phase_step
        return step % guard.every == 0 or step == phase.steps

    def _step(self, tuned: PhaseModel, phase: PhaseConfig, windows_WT: Tensor) -> StepReport:
        began = time.perf_counter()
        step, rank = self.progress.phase_step, self.workers.rank
        ids_B = batch_indices(step, windows_WT.shape[0], phase.batch_size, self.seed)
        torch.manual_seed(step_seed(self.seed, self.progress.step, rank))
        tuned.model.train()
        ids_BT = windows_WT[self.workers.share(ids_B)].to(self.workers.device, torch.int64)
        with ExpertLoadCounter(tuned.model, probabilities=phase.balance_loss > 0) as counter:
            loss, rate, loads = self._update(tuned, phase, ids_BT, counter)
        if phase.balance_update:
            counter.apply(loads, phase.balance_update)
        seconds = time.perf_counter() - began
        self.progress = replace(
            self.progress,
            losses=(*self.progress.losses, loss),
            seconds=self.progress.seconds + seconds,
        )
        tokens = phase.batch_size * windows_WT.shape[1]
        return StepReport(self.progress.step, loss, rate, Balance.of(loads), tokens / seconds)

    def _update(
        self,
        tuned: PhaseModel,
        phase: PhaseConfig,
        ids_BT: Tensor,
        counter: ExpertLoadCounter,
    ) -> tuple[float, float, dict[str, ExpertLoad]]:
        """One step of the optimizer: loss over all processes, learning rate, loads."""
        optimizer, step = tuned.state.optimizer, self.progress.phase_step
        factor = learning_rate_factor(step, phase.steps, phase.warmup_steps, phase.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        # Around the backward pass too, where a divided model computes its layers again.
        with routed_to_all(tuned.model, phase.temperature):
            value, loads = self._gradients(tuned, phase, ids_BT, counter)
        parameters = tuned.state.parameters.values()
        self.workers.add_gradients(parameters)
        norm = clip_gradients(parameters, CLIP_NORM)
        if not math.isfinite(norm):
            raise NotFiniteError(f"norm of the gradients is {norm} at step {step + 1}")
        optimizer.step()
        return value, phase.learning_rate * factor, loads

    def _gradients(
        self,
        tuned: PhaseModel,
        phase: PhaseConfig,
        ids_BT: Tensor,
        counter: ExpertLoadCounter,
    ) -> tuple[float, dict[str, ExpertLoad]]:
        """Gradients of this process' part; loss and loads over all processes."""
        with self.workers.autocast():
            loss = self._loss(tuned, phase, ids_BT)
        loads = self.workers.add_loads(counter.take())
        if phase.balance_loss:
            loss = loss + phase.balance_loss * counter.loss(loads)
        # The sum over the processes is the mean over the batch.
        loss = loss * (len(ids_BT) / phase.batch_size)
        value = float(self.workers.sum(loss.detach()))
        if not math.isfinite(value):
            step = self.progress.phase_step + 1
            raise NotFiniteError(f"loss is {value} at step {step}")
        loss.backward()
        return value, loads

    def _loss(self, tuned: PhaseModel, phase: PhaseConfig, ids_BT: Tensor) -> Tensor:
        if phase.objective == "next-token":
            return training_loss(tuned.model, ids_BT)
        assert phase.distill_weight is not None, "the phase is not resolved"
        return training_loss(
            tuned.model, ids_BT, teacher=self.teacher, distill_weight=phase.distill_weight
        )

    def _measure(self, tuned: PhaseModel, guard: Guard) -> HeldOut:
        """The model on held-out text; what could be measured before and no more has diverged."""
        step = self.progress.phase_step
        try:
            held_out = self._evaluate(tuned, guard)
        except WeaverError as error:
            raise NotFiniteError(f"{error.what}, after step {step}") from error
        for name in ("kl", "perplexity"):
            value = getattr(held_out, name)
            if not math.isfinite(value):
                raise NotFiniteError(f"held-out {name} is {value} after step {step}")
        return held_out

    def _evaluate(self, tuned: PhaseModel, guard: Guard) -> HeldOut:
        """Evaluate the model with the guard and return the main process's result everywhere."""
        tuned.model.eval()
        found: HeldOut | None = None
        if self.workers.reads_weights:
            with self.workers.autocast():
                found = guard.evaluate(tuned.model)
        found = self.workers.agree(found)
        assert found is not None
        return found

    def _note(self, held_out: HeldOut, tuned: PhaseModel, guard: Guard) -> None:
        found = Evaluation(self.progress.step, self.progress.phase, held_out)
        evaluations = (*self.progress.evaluations, found)
        self.progress = replace(self.progress, evaluations=evaluations)
        if self.workers.reads_weights and guard.best(evaluations) is found:
            self._save_best(tuned.merged(self.names), found.step)
        if self.on_evaluation is not None:
            self.on_evaluation(found)

    def _save_best(self, tensors: dict[str, Tensor], step: int) -> None:
        if not self.workers.is_main:
            return
        save_best(self.folder, step, tensors)
        # A resumed training begins with the best weights that its checkpoint knows.
        saved = set() if self.saved_best is None else {self.saved_best}
        prune_best(self.folder, {step} | saved)

    def _save(self, tuned: PhaseModel) -> None:
        if not self.workers.reads_weights:
            return
        tensors = tuned.state.tensors()
        if not self.workers.is_main:
            return
        save_checkpoint(self.folder, tensors, self.progress, self.settings)
        if self.guard is not None:
            self.saved_best = self.guard.best(self.progress.evaluations).step
            prune_best(self.folder, {self.saved_best})
