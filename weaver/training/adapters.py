"""Low-rank adapters for a phase of a fine-tuning: attached, trained, merged, gone.

The attention's projections are modules, and PEFT's adapters take their place. The FFN's matrices
are not: ``MoEFeedForward`` holds all experts in three parameters of two dimensions and reads them
through ``weights()``. PEFT has ``target_parameters`` for such weights, but refuses dropout there,
takes one parameter of a module per adapter, and nests a wrapper around the FFN for each, which
hides it from whoever looks for routed layers. So these three get torch's own parametrization
(``LowRank``), which leaves the module where it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from weaver.config.finetuning import AdapterConfig
from weaver.errors import WeaverError

ATTENTION = "self_attn"
# The matrices of a converted FFN, and whether its rows are the inputs of the linear map: neuron j
# is row j everywhere, so the down projection is stored transposed.
FFN_MATRICES = {"gate_weight": False, "up_weight": False, "down_weight": True}
_ADAPTER = "default"


class LowRank(nn.Module):
    """A matrix plus a product of two thin ones, as a parametrization of that matrix.

    W' = W + (alpha / r) * B A,    A (r, I) uniform as in a linear layer, B (O, r) zero

    for a map from I inputs to O outputs stored as (O, I), and ``W + (alpha / r) * (B A)^T`` where
    it is stored as (I, O). At the start W' is W.

    Args:
        weight: W, for its shape, dtype and device.
        config: r, alpha, dropout.
        inputs_first: W is stored as (I, O).

    Source: LoRA, arXiv:2106.09685, equation 3 and section 4.1.
    Known deviation: dropout of the adapter's inputs is one mask for all tokens of a step, since a
    weight does not know the tokens: column i of A is 0 or ``A_i / (1 - p)``.
    """

    def __init__(self, weight: Tensor, config: AdapterConfig, *, inputs_first: bool) -> None:
        super().__init__()
        inputs, outputs = weight.shape if inputs_first else weight.shape[::-1]
        self.scaling = config.alpha / config.rank
        self.dropout = config.dropout
        self.inputs_first = inputs_first
        self.lora_A = nn.Parameter(weight.new_empty(config.rank, inputs))
        self.lora_B = nn.Parameter(weight.new_zeros(outputs, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """W'."""
        a_RI: Tensor = self.lora_A
        if self.dropout:
            ones_I = a_RI.new_ones(a_RI.shape[1])
            a_RI = a_RI * functional.dropout(ones_I, self.dropout, self.training)
        delta = self.lora_B @ a_RI
        return weight + self.scaling * (delta.T if self.inputs_first else delta)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model in training.

    Args:
        model: the model that they are attached to.
        attention: names of the projections that PEFT has wrapped.
        ffns: names of the modules whose matrices are parametrized.
    """

    model: nn.Module
    attention: tuple[str, ...]
    ffns: tuple[str, ...]

    def merged(self, name: str) -> Tensor:
        """A parameter or buffer as it would be without adapters, merged into a copy.

        Args:
            name: its name in the model before adapters were attached.
        """
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        if path in self.attention and attribute == "weight":
            layer: Any = module
            value: Tensor = layer.base_layer.weight + layer.get_delta_weight(_ADAPTER)
        else:
            value = getattr(module, attribute)
        return value.detach()

    def merge(self) -> None:
        """Add every adapter to its weight and take it away; names are then those of before."""
        self.model.eval()  # without dropout
        for name in self.attention:
            parent, _, child = name.rpartition(".")
            layer: Any = self.model.get_submodule(name)
            layer.merge()
            setattr(self.model.get_submodule(parent), child, layer.base_layer)
        if self.attention:
            del self.model.peft_config
        for name in self.ffns:
            for matrix in FFN_MATRICES:
                module = self.model.get_submodule(name)
                parametrize.remove_parametrizations(module, matrix, leave_parametrized=True)


def adapted_names(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the parameters that adapters change, in a model without adapters.

    Raises:
        WeaverError: the model has none of the targets.
    """
    names = [f"{name}.weight" for name in _projections(model, config)]
    names += [f"{name}.{matrix}" for name in _ffns(model, config) for matrix in FFN_MATRICES]
    if not names:
        raise WeaverError(
            f"the model has 0 weights that lora.targets={list(config.targets)} names",
            why=f"attention is every linear layer below {ATTENTION}, ffn every converted FFN",
            fix="rerun with --set finetune.trainable=all",
        )
    return names


def attach_adapters(model: nn.Module, config: AdapterConfig, *, seed: int) -> Adapters:
    """Put adapters on a model; what it computes does not change yet.

    Args:
        model: the model, changed in place.
        config: rank, alpha, dropout, and which weights.
        seed: of the random halves of the adapters.

    Raises:
        WeaverError: the model has none of the targets.
    """
    adapted_names(model, config)
    attention, ffns = _projections(model, config), _ffns(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if attention:
            _attach_to_modules(model, config, attention)
        for name in ffns:
            module = model.get_submodule(name)
            for matrix, inputs_first in FFN_MATRICES.items():
                low_rank = LowRank(getattr(module, matrix), config, inputs_first=inputs_first)
                parametrize.register_parametrization(module, matrix, low_rank)
    return Adapters(model, tuple(attention), tuple(ffns))


def _attach_to_modules(model: nn.Module, config: AdapterConfig, names: list[str]) -> None:
    # It takes a second to import, and nothing else needs it.
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it by r and no more
        lora_dropout=config.dropout,
        target_modules=names,
    )
    inject_adapter_in_model(settings, model, adapter_name=_ADAPTER)


def _projections(model: nn.Module, config: AdapterConfig) -> list[str]:
    if "attention" not in config.targets:
        return []
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ATTENTION in name.split(".")
    ]


def _ffns(model: nn.Module, config: AdapterConfig) -> list[str]:
    if "ffn" not in config.targets:
        return []
    return [
        name
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, matrix, None), nn.Parameter) for matrix in FFN_MATRICES)
    ]
