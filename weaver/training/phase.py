"""A model made ready for one phase, and what all phases together change in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from weaver.config.finetuning import PhaseConfig
from weaver.training.adapters import Adapters, adapted_names, attach_adapters
from weaver.training.balance import routed_layers
from weaver.training.checkpoint import TrainingState
from weaver.training.optimizer import build_optimizer, select_trainable, trained_names


@dataclass(frozen=True)
class PhaseModel:
    """A model in one phase.

    Args:
        model: the model, with the phase's adapters.
        state: what a step changes, and what a checkpoint has to hold besides.
        adapters: None where the weights are trained as they are.
    """

    model: PreTrainedModel
    state: TrainingState
    adapters: Adapters | None

    def merged(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the model as they are once its adapters are merged, by their final names."""
        if self.adapters is not None:
            return {name: self.adapters.merged(name) for name in names}
        return {name: plain_tensor(self.model, name).detach() for name in names}

    def leave(self) -> None:
        """End the phase: merge the adapters."""
        if self.adapters is not None:
            self.adapters.merge()


def enter_phase(
    model: PreTrainedModel, phases: Sequence[PhaseConfig], index: int, *, seed: int
) -> PhaseModel:
    """Attach adapters, freeze what is not trained, and build the optimizer.

    Args:
        model: the model without adapters, changed in place.
        phases: all phases, resolved.
        index: which one begins.
        seed: of the training; the adapters' depends on it and on the phase.

    Raises:
        ValueError: a trained parameter has fewer bits than float32.
        WeaverError: there is nothing to train.
    """
    phase = phases[index]
    earlier = {name: plain_tensor(model, name) for name in changed_names(model, phases[:index])}
    adapters = None
    if phase.lora is not None:
        adapters = attach_adapters(model, phase.lora, seed=_adapter_seed(seed, index))
    parameters = select_trainable(model, phase)
    # Attaching renames parameters and leaves the tensors themselves in place.
    trained = {id(parameter) for parameter in parameters.values()}
    buffers = {name: t for name, t in earlier.items() if id(t) not in trained}
    buffers |= {name: plain_tensor(model, name) for name in balance_biases(model)}
    return PhaseModel(
        model,
        TrainingState(parameters, buffers, build_optimizer(parameters, phase)),
        adapters,
    )


def changed_names(model: nn.Module, phases: Sequence[PhaseConfig]) -> list[str]:
    """Parameters and buffers that phases change, by their names in the model without adapters.

    Args:
        model: the model without adapters.
        phases: resolved.
    """
    names: dict[str, None] = {}
    for phase in phases:
        if phase.lora is not None:
            names |= dict.fromkeys(adapted_names(model, phase.lora))
        names |= dict.fromkeys(trained_names(model, phase))
    return [*names, *balance_biases(model)] if phases else []


def balance_biases(model: nn.Module) -> list[str]:
    """Names of the buffers that balance the load."""
    return [f"{name}.router.balance_bias" for name in routed_layers(model)]


def plain_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tensor


def _adapter_seed(seed: int, phase: int) -> int:
    # Three numbers, so that it is no seed of a step.
    return int(np.random.SeedSequence([seed, phase, 1]).generate_state(1, np.uint64)[0])
