"""Training checkpoints: one safetensors file, replaced as a whole, without pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from weaver.errors import WeaverError, shell
from weaver.training.guard import Evaluation, prune_best
from weaver.training.sealed import read_sealed, write_sealed
from weaver.training.sharding import divided_like, whole

_PATTERN = "step-*.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """Everything that a training step changes.

    Args:
        parameters: the trained parameters by name.
        buffers: what changes without an optimizer, by name: balance biases, and parameters that
            earlier phases have trained and this one leaves alone.
        optimizer: its state is kept per parameter.
    """

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    optimizer: Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Flat view: ``parameter/NAME``, ``buffer/NAME``, ``optimizer/KEY/NAME``, nothing divided.

        Copies are made of divided tensors alone; every process has to call it if there are any.
        """
        flat = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        flat |= {f"buffer/{name}": b for name, b in self.buffers.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                flat[f"optimizer/{key}/{name}"] = value
        return {key: whole(tensor) for key, tensor in flat.items()}

    def load(self, flat: Mapping[str, Tensor]) -> None:
        """Inverse of ``tensors()``, in place.

        Raises:
            ValueError: a tensor is missing, has another shape, or belongs to no parameter.
        """
        moments = self._moments(flat)
        current: dict[str, Tensor] = {f"parameter/{n}": p for n, p in self.parameters.items()}
        current |= {f"buffer/{name}": b for name, b in self.buffers.items()}
        for key, target in current.items():
            if key not in flat or flat[key].shape != target.shape:
                raise ValueError(f"{key} is missing or has another shape")
        surplus = {key for key in flat if not key.startswith("optimizer/")} - current.keys()
        if surplus:
            raise ValueError(f"{min(surplus)} is not in the model")
        # Everything is checked before anything is written: a refused file leaves the model alone.
        with torch.no_grad():
            for key, target in current.items():
                target.copy_(divided_like(flat[key], target))
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = _moments_like(moments[name], parameter)

    def _moments(self, flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Optimizer state by parameter name, then by key."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.parameters}
        for key, value in flat.items():
            if not key.startswith("optimizer/"):
                continue
            _, moment, name = key.split("/", 2)
            if name not in moments:
                raise ValueError(f"{key} belongs to no trained parameter")
            if value.ndim and value.shape != self.parameters[name].shape:
                raise ValueError(f"{key} has another shape than its parameter")
            moments[name][moment] = value
        return moments


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Args:
        losses: loss of every step done, over all phases.
        seconds: time that they took.
        phase_starts: steps done before each phase, up to the one at work.
        evaluations: what the guard saw.
    """

    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    phase_starts: tuple[int, ...] = (0,)
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def step(self) -> int:
        """Steps done, over all phases."""
        return len(self.losses)

    @property
    def phase(self) -> int:
        """The phase at work, counted from 0."""
        return len(self.phase_starts) - 1

    @property
    def phase_step(self) -> int:
        """Steps done of the phase at work."""
        return self.step - self.phase_starts[-1]

    @property
    def phase_steps(self) -> tuple[int, ...]:
        """Steps done of every phase, up to the one at work."""
        ends = (*self.phase_starts[1:], self.step)
        return tuple(end - start for start, end in zip(self.phase_starts, ends, strict=True))

    def metadata(self) -> dict[str, Any]:
        """All but the losses, as JSON values."""
        return {
            "seconds": self.seconds,
            "phase_starts": list(self.phase_starts),
            "evaluations": [each.to_dict() for each in self.evaluations],
        }


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint that was found on disk.

    Args:
        path: the file.
        progress: how far the training had come.
        tensors: the state, as ``TrainingState.tensors`` gave it.
    """

    path: Path
    progress: Progress
    tensors: Mapping[str, Tensor]

    def load(self, state: TrainingState) -> None:
        """Put it into the model and the optimizer.

        Raises:
            WeaverError: it was written for another model.
        """
        try:
            state.load(self.tensors)
        except ValueError as error:
            raise _unfit(self.path, error) from error


def save_checkpoint(
    folder: Path, state: Mapping[str, Tensor], progress: Progress, settings: Mapping[str, Any]
) -> Path:
    """Write ``step-N.safetensors``, then remove the older ones.

    The file appears under its name only when it is complete on disk; until then the older one
    stays, so that there is a usable checkpoint at any moment.

    Args:
        folder: where checkpoints lie.
        state: what ``TrainingState.tensors`` gave.
        progress: how far the training has come.
        settings: what a training that continues it must have.

    Raises:
        WeaverError: the folder cannot be written.
    """
    path = folder / f"step-{progress.step:08d}.safetensors"
    tensors = {**state, "losses": torch.tensor(progress.losses, dtype=torch.float64, device="cpu")}
    write_sealed(path, tensors, {"settings": dict(settings), **progress.metadata()})
    for other in folder.glob(_PATTERN):
        if other != path:
            other.unlink()
    return path


def read_checkpoint(folder: Path, settings: Mapping[str, Any]) -> TrainingCheckpoint | None:
    """The newest checkpoint; None means nothing done.

    Raises:
        WeaverError: the file is damaged, or was written with other settings.
    """
    paths = sorted(folder.glob(_PATTERN))
    if not paths:
        return None
    path = paths[-1]
    tensors, metadata = read_sealed(path, rebuild=_start_again(path))
    _check_settings(path, metadata.get("settings", {}), settings)
    losses = tensors.pop("losses", None)
    try:
        if losses is None:
            raise ValueError("losses is missing")
        progress = Progress(
            losses=tuple(losses.tolist()),
            seconds=float(metadata["seconds"]),
            phase_starts=tuple(metadata["phase_starts"]),
            evaluations=tuple(map(Evaluation.from_dict, metadata["evaluations"])),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise _unfit(path, error) from error
    return TrainingCheckpoint(path, progress, tensors)


def remove_checkpoints(folder: Path) -> None:
    """Delete what a finished training leaves, and the folder if it is then empty."""
    for path in folder.glob(_PATTERN):
        path.unlink()
    prune_best(folder, keep=())
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def windows_digest(windows_WT: Tensor) -> str:
    """SHA-256 of the training windows (shape and token ids)."""
    digest = hashlib.sha256(repr(tuple(windows_WT.shape)).encode())
    digest.update(windows_WT.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _start_again(path: Path) -> str:
    return f"delete {shell(path)} and rerun the same command: it then starts at step 0"


def _unfit(path: Path, error: Exception) -> WeaverError:
    return WeaverError(
        f"{path}: does not fit the model that is being trained",
        why=str(error),
        fix=_start_again(path),
    )


def _check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = sorted({*found, *wanted})
    differing = [key for key in keys if found.get(key) != wanted.get(key)]
    if differing:
        changes = ", ".join(f"{key} {found.get(key)} -> {wanted.get(key)}" for key in differing)
        raise WeaverError(
            f"{path}: written with other settings ({changes})",
            why="a resumed training must equal an undisturbed one",
            fix=f"restore the settings, or delete {shell(path)} to start at step 0",
        )


def _moments_like(moments: Mapping[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
    """Copies on the parameter's device; the step counter stays on the CPU, where AdamW keeps it."""
    return {
        key: value.clone() if value.ndim == 0 else divided_like(value, parameter)
        for key, value in moments.items()
    }
