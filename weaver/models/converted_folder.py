"""A converted model on disk, read layer by layer: what exports are made from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.store import check_tensors_file
from weaver.artifacts.types import Router
from weaver.models.accounting import LayerShape
from weaver.models.families import ALL_FAMILIES, CONVERTED_PREFIX, Family, activation_name
from weaver.models.hf import register
from weaver.models.intake import read_config
from weaver.models.locate import weight_files
from weaver.models.sites import TwoLevelShape, read_shape, site_shapes


@dataclass(frozen=True)
class ConvertedLayer:
    """One converted FFN, see ``weaver.models.moe.MoEFeedForward``.

    Args:
        shape: S, E, N, K and which biases there are.
        weights: the permuted FFN: S shared neurons, then N per expert.
        router: None for a static layer.
        expert_bias_ED: constants of the experts, (E, D), or None.
    """

    shape: LayerShape
    weights: GluWeights
    router: Router | None
    expert_bias_ED: Tensor | None = None


class ConvertedCheckpoint:
    """A folder with a model of weaver's own type.

    Args:
        folder: as ``assemble`` or ``finetune`` wrote it.

    ``shapes`` holds one shape per FFN: a layer's, or with ``two_level`` those of its experts.
    """

    def __init__(self, folder: Path) -> None:
        register()
        self.folder = folder
        self.config: PreTrainedConfig = read_config(folder)
        self.family: Family = ALL_FAMILIES[self.config.model_type.removeprefix(CONVERTED_PREFIX)]
        layers = [read_shape(entry) for entry in self.config.weaver["layers"]]
        self.num_layers = len(layers)
        self.two_level = any(isinstance(layer, TwoLevelShape) for layer in layers)
        self.shapes = site_shapes(layers)
        self._files: dict[str, Path] = {}
        self._elements: dict[str, int] = {}
        for path in weight_files(folder):
            for name, entry in check_tensors_file(path).entries.items():
                self._files[name], self._elements[name] = path, entry.elements

    @property
    def activation(self) -> str:
        """weaver's name of the GLU's activation."""
        hf_name = getattr(self.config, self.family.activation_field)
        return activation_name(hf_name, model=str(self.folder))

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        name = next(name for name in self.names() if name.endswith(".gate_weight"))
        return self.tensor(name).dtype

    def names(self) -> list[str]:
        """Every tensor of the checkpoint."""
        return sorted(self._files)

    def outer_names(self) -> list[str]:
        """Tensors outside the decoder layers."""
        return [name for name in self.names() if not name.startswith(f"{self.family.layers}.")]

    def layer_names(self, layer: int) -> list[str]:
        """Tensors of a decoder layer outside its FFN."""
        prefix = f"{self.family.layers}.{layer}."
        return [
            name
            for name in self.names()
            if name.startswith(prefix) and not name.startswith(self._ffn_prefix(layer))
        ]

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    def elements(self, name: str) -> int:
        """Number of values of a tensor, without reading it."""
        return self._elements[name]

    def was_trained(self, name: str) -> bool:
        """Whether training has moved a tensor that starts at zero, such as ``router.scale``."""
        names = [f"{self._ffn_prefix(layer)}{name}" for layer in range(self.num_layers)]
        return any(bool(self.tensor(each).any()) for each in names if each in self._files)

    def layer(self, layer: int) -> ConvertedLayer:
        """The FFN of one layer, in the dtype it is stored in."""
        assert not self.two_level, "a layer of two levels has many"
        prefix = self._ffn_prefix(layer)
        state = {
            name.removeprefix(prefix): self.tensor(name)
            for name in self.names()
            if name.startswith(prefix)
        }
        weights = GluWeights(
            gate_FD=state["gate_weight"],
            up_FD=state["up_weight"],
            down_FD=state["down_weight"],
            activation=self.activation,
            gate_bias_F=state.get("gate_bias"),
            up_bias_F=state.get("up_bias"),
            output_bias_D=state.get("output_bias"),
        )
        shape = self.shapes[layer]
        router = None
        if shape.router_kind is not None:
            router = Router(
                kind=shape.router_kind,
                weight_ED=state["router.weight"],
                scale_E=state["router.scale"],
                balance_bias_E=state["router.balance_bias"],
                up_weight_ED=state.get("router.up_weight"),
                bias_E=state.get("router.bias"),
                weighting=shape.weighting,
                routed_scaling=shape.routed_scaling,
            )
        return ConvertedLayer(shape, weights, router, state.get("expert_bias"))

    def _ffn_prefix(self, layer: int) -> str:
        return f"{self.family.layers}.{layer}.{self.family.ffn}."
