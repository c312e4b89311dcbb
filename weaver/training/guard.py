"""Quality on held-out text while a model is trained: the best weights are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from weaver.errors import WeaverError, shell
from weaver.training.sealed import read_sealed, write_sealed

_PATTERN = "best-*.safetensors"


@dataclass(frozen=True)
class HeldOut:
    """A model on held-out text, next to the dense one.

    Args:
        perplexity: of the model.
        kl: KL(dense || model), nats per token.
        dense_perplexity: of the dense model.
    """

    perplexity: float
    kl: float
    dense_perplexity: float


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a model in training on held-out text, with its step and phase.

    Args:
        step: steps done before it, over all phases; 0 is the model before the training.
        phase: the phase at work, counted from 0.
        held_out: how good the model was.
    """

    step: int
    phase: int
    held_out: HeldOut

    def to_dict(self) -> dict[str, Any]:
        """The same as flat JSON values."""
        return {"step": self.step, "phase": self.phase, **asdict(self.held_out)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """Inverse of ``to_dict``."""
        rest = dict(values)
        return cls(rest.pop("step"), rest.pop("phase"), HeldOut(**rest))


@dataclass(frozen=True)
class Guard:
    """When a model in training is evaluated, which weights count as the best, and when to stop.

    Everything it decides follows from the evaluations so far, which are part of the checkpoint.

    Args:
        evaluate: measures a model on held-out text.
        every: steps of a phase between two evaluations; there is also one before the first step
            and one after the last of each phase.
        best_by: what is lowest at the best weights; of equal ones the earlier are better.
        patience: evaluations without a new best after which a phase ends; None for never.
    """

    evaluate: Callable[[PreTrainedModel], HeldOut]
    every: int
    best_by: Literal["kl", "perplexity"] = "kl"
    patience: int | None = None

    def best(self, evaluations: Sequence[Evaluation]) -> Evaluation:
        """The evaluation of the best weights so far."""
        return min(evaluations, key=lambda each: (getattr(each.held_out, self.best_by), each.step))

    def exhausted(self, evaluations: Sequence[Evaluation], phase: int) -> bool:
        """Whether the phase's last ``patience`` evaluations brought nothing better."""
        if self.patience is None:
            return False
        best = self.best(evaluations)
        since = sum(each.phase == phase and each.step > best.step for each in evaluations)
        return since >= self.patience


def save_best(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Write ``best-N.safetensors``: the weights after N steps, merged, under their final names.

    Raises:
        WeaverError: the folder cannot be written.
    """
    write_sealed(best_path(folder, step), tensors, {"step": step})


def load_best(folder: Path, step: int) -> dict[str, Tensor]:
    """Read the merged weights that ``save_best`` wrote after ``step`` steps, by name.

    Raises:
        WeaverError: the file is missing or damaged.
    """
    path = best_path(folder, step)
    fix = f"{shell('rm', '-r', folder)}, then rerun the same command: it starts at step 0"
    try:
        return read_sealed(path, rebuild=fix)[0]
    except WeaverError as error:
        raise WeaverError(
            error.what, why="the best weights lie there while the training runs", fix=fix
        ) from error


def prune_best(folder: Path, keep: Iterable[int]) -> None:
    """Remove the best weights of all steps but some."""
    kept = {best_path(folder, step) for step in keep}
    for path in folder.glob(_PATTERN):
        if path not in kept:
            path.unlink()


def best_path(folder: Path, step: int) -> Path:
    """File of the weights after some steps."""
    return folder / f"best-{step:08d}.safetensors"
