"""A model made ready for one phase, and what all phases together change in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weaver.config.finetuning import PhaseConfig
from weaver.training.adapters import Adapters, adapted_names, attach_adapters
from weaver.training.balance import routed_layers
from weaver.training.checkpoint import TrainingState
from weaver.training.optimizer import build_optimizer, select_trainable, trained_names
from weaver.training.sharding import read_layers
from weaver.training.workers import Workers


@dataclass(frozen=True)
class PhaseModel:
    """A model in one phase.

    Args:
        model: the model, with the phase's adapters.
        state: what a step changes, and what a checkpoint has to hold besides.
        adapters: None where the weights are trained as they are.
        source: the model that this one is a divided copy of; None where it is the model itself.
    """

    model: PreTrainedModel
    state: TrainingState
    adapters: Adapters | None
    source: PreTrainedModel | None = None

    @torch.no_grad()
    def merged(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the model as they are once its adapters are merged, by their final names."""
        if self.source is not None:
            return read_layers(self.model, names, self._merged)
        return {name: self._merged(name) for name in names}

    def leave(self, names: Sequence[str]) -> None:
        """End the phase: merge the adapters, or write what was trained into the source.

        Args:
            names: tensors that any phase changes.
        """
        if self.source is not None:
            load_tensors(self.source, self.merged(names))
        elif self.adapters is not None:
            self.adapters.merge()

    def _merged(self, name: str) -> Tensor:
        if self.adapters is not None:
            return self.adapters.merged(name)
        return plain_tensor(self.model, name).detach()


def enter_phase(
    model: PreTrainedModel,
    phases: Sequence[PhaseConfig],
    index: int,
    *,
    seed: int,
    workers: Workers,
) -> PhaseModel:
    """Attach adapters, freeze what is not trained, place the model, and build the optimizer.

    Args:
        model: the model without adapters, changed in place; where weights are divided, a copy is.
        phases: all phases, resolved.
        index: which one begins.
        seed: of the training; the adapters' depends on it and on the phase.
        workers: the processes that train together.

    Raises:
        ValueError: a trained parameter has fewer bits than float32.
        WeaverError: there is nothing to train.
    """
    phase = phases[index]
    # Adapters cannot be taken off a divided model: it serves one phase.
    source, model = (model, deepcopy(model)) if workers.sharded else (None, model)
    earlier = {name: plain_tensor(model, name) for name in changed_names(model, phases[:index])}
    adapters = None
    if phase.lora is not None:
        adapters = attach_adapters(model, phase.lora, seed=_adapter_seed(seed, index))
    select_trainable(model, phase)
    # Attaching renames parameters and leaves the tensors in place, placing does the opposite.
    names = {id(tensor): name for name, tensor in _tensors(model).items()}
    renamed = {name: names[id(tensor)] for name, tensor in earlier.items()}
    workers.place(model)
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    buffers = {n: plain_tensor(model, at) for n, at in renamed.items() if at not in parameters}
    buffers |= {name: plain_tensor(model, name) for name in balance_biases(model)}
    state = TrainingState(parameters, buffers, build_optimizer(parameters, phase))
    return PhaseModel(model, state, adapters, source)


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


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of their names."""
    for name, tensor in tensors.items():
        plain_tensor(model, name).copy_(tensor)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _adapter_seed(seed: int, phase: int) -> int:
    # Three numbers, so that it is no seed of a step.
    return int(np.random.SeedSequence([seed, phase, 1]).generate_state(1, np.uint64)[0])
