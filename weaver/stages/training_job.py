"""A fine-tuning at work: models, text, and what is shown and logged on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.config.finetuning import FinetuneConfig, PhaseConfig
from weaver.evaluation.perplexity import compare
from weaver.kernels.machine import cpu_features
from weaver.report.tracking import Log
from weaver.rundir.converted_model import ConvertedModel
from weaver.rundir.stage_run import StageContext
from weaver.training.guard import Evaluation, Guard, HeldOut
from weaver.training.loop import DivergedError, TrainingReport
from weaver.training.loop import finetune as train
from weaver.training.trainer import StepReport
from weaver.training.workers import Workers

CHECKPOINTS = "checkpoints"


class RescuedError(Exception):
    """A training that diverged.

    Args:
        model: the model as it was at its best.
        error: what happened.
    """

    def __init__(self, model: PreTrainedModel, error: DivergedError) -> None:
        super().__init__(error.what)
        self.model = model
        self.error = error


@dataclass(frozen=True)
class TrainingJob:
    """Models, phases and texts of a training, the same in every process.

    Args:
        converted: the assembled model and the dense one.
        config: the section.
        phases: its phases, resolved.
        texts: windows of training text by their length.
        held_out_WT: windows that the guard measures on.
        workers: the processes that train together.
    """

    converted: ConvertedModel
    config: FinetuneConfig
    phases: Sequence[PhaseConfig]
    texts: Mapping[int, Tensor]
    held_out_WT: Tensor
    workers: Workers

    def train(
        self, context: StageContext, folder: Path, log: Log
    ) -> tuple[PreTrainedModel, TrainingReport]:
        """Train, with checkpoints in the stage's folder.

        Args:
            context: progress and seed.
            folder: of the stage.
            log: takes curves.

        Raises:
            RescuedError: the training has diverged.
        """
        model = self.converted.load("float32")
        dense = _load_teacher(self.converted, self.workers.device.type)
        self.workers.place(dense)
        with context.progress("finetune", sum(phase.steps for phase in self.phases)) as advance:

            def on_step(report: StepReport) -> None:
                advance(_step_line(report))
                log(_step_values(report), report.step)

            def on_evaluation(found: Evaluation) -> None:
                context.say(_line(found))
                log({"kl": found.held_out.kl, "perplexity": found.held_out.perplexity}, found.step)

            try:
                report = train(
                    model,
                    [self.texts[phase.sequence_length] for phase in self.phases],
                    self.config,
                    seed=context.seed,
                    checkpoint_dir=folder / CHECKPOINTS,
                    teacher=dense,
                    guard=Guard(
                        lambda tuned: _held_out(dense, tuned, self.held_out_WT),
                        self.config.evaluate_every,
                        self.config.best_by,
                        self.config.patience,
                    ),
                    workers=self.workers,
                    on_step=on_step,
                    on_evaluation=on_evaluation,
                )
            except DivergedError as error:
                raise RescuedError(model, error) from error
        return model, report


def _load_teacher(converted: ConvertedModel, device: str) -> PreTrainedModel:
    """The dense model in its own dtype; in float32 where the processor is slow at that one."""
    own = converted.dtype("auto")
    fast = own == torch.float32 or device == "cuda"
    fast = fast or (own == torch.bfloat16 and "bf16" in cpu_features())
    return converted.load_dense("auto" if fast else "float32").requires_grad_(False)


def _held_out(dense: PreTrainedModel, tuned: PreTrainedModel, windows_WT: Tensor) -> HeldOut:
    comparison = compare(dense, tuned, windows_WT)
    return HeldOut(comparison.moe.perplexity, comparison.kl, comparison.dense.perplexity)


def _step_line(report: StepReport) -> str:
    parts = [f"step {report.step}", f"loss {report.loss:.3f}"]
    if report.balance is not None:
        parts.append(f"load max/mean {report.balance.max_over_mean:.2f}")
        parts.append(f"idle experts {report.balance.idle:.1%}")
    return ", ".join([*parts, f"{report.tokens_per_second:.0f} tokens/s"])


def _step_values(report: StepReport) -> dict[str, float]:
    values = {
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "tokens_per_second": report.tokens_per_second,
    }
    if report.balance is not None:
        values |= {"load_max_over_mean": report.balance.max_over_mean}
        values |= {"idle_experts": report.balance.idle}
    return values


def _line(found: Evaluation) -> str:
    held_out = found.held_out
    return (
        f"  step {found.step}: held-out perplexity {held_out.perplexity:.3f}, KL {held_out.kl:.5f}"
    )
