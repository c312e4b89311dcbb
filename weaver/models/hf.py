"""Converted models as Hugging Face models: a config, a backbone and a causal LM per family.

After ``register()`` ``AutoModelForCausalLM.from_pretrained`` loads a converted model, and
``AutoModel`` its backbone. Each class is the family's own with the FFNs
replaced, so attention, caches, ``generate``, padding, device maps and saving are transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from weaver.artifacts.types import EARLY_TOKENS, FIRST_TOKENS
from weaver.models.families import ALL_FAMILIES, CONVERTED_PREFIX, Family, activation_name
from weaver.models.moe import MoEFeedForward
from weaver.models.pacing import PacedLayer, pace
from weaver.models.sites import AnyShape, read_shape
from weaver.models.two_level import converted_module, place


@dataclass(frozen=True)
class ConvertedClasses:
    """Config, backbone and causal LM classes of one family's converted models."""

    config: type[PreTrainedConfig]
    backbone: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


def replace_ffns(model: PreTrainedModel, family: Family, config: PreTrainedConfig) -> None:
    """Put a ``MoEFeedForward`` in place of every FFN, shaped as ``config.weaver`` says.

    In the place of an expert, where the model is a Mixture of Experts already.

    Args:
        model: a causal LM or its backbone.
        family: names of its parts.
        config: the converted model's.
    """
    activation = activation_name(getattr(config, family.activation_field), model=config.model_type)
    path = family.layers.removeprefix(f"{model.base_model_prefix}.")
    layers = model.base_model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    paced: list[tuple[MoEFeedForward, PacedLayer]] = []
    for layer, entry in zip(layers, config.weaver["layers"], strict=True):
        shape = read_shape(entry)
        ffn = converted_module(shape, config.hidden_size, activation, std=config.initializer_range)
        place(layer, family, ffn)
        # Experts inside experts see some tokens of a sequence only, and are not paced.
        if isinstance(ffn, MoEFeedForward) and ffn.paced is not None:
            paced.append((ffn, ffn.paced))
    places = (config.weaver.get(name, 0) for name in ("first_tokens", "early_tokens"))
    pace(model.base_model, paced, *places)


class _WithoutCode:
    """Ignores that transformers marks the classes of a folder that has code and is trusted.

    From then on it would copy this module's file into every folder that is saved. The mark of a
    dense class is not inherited either: a folder's code may name that class for its own.
    """

    _auto_class = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Do nothing."""


def _converted_classes(family: Family) -> ConvertedClasses:
    dense_model: type[PreTrainedModel] = getattr(transformers, family.causal_lm)
    dense_config = dense_model.config_class
    assert dense_config is not None
    dense_backbone: Any = transformers.MODEL_MAPPING[dense_config]

    class ConvertedConfig(_WithoutCode, dense_config):  # type: ignore[valid-type, misc]
        model_type = family.converted_model_type
        # The converted FFN has no gate_proj, up_proj or down_proj to shard by name.
        base_model_tp_plan = None
        base_model_ep_plan = None

        def to_dict(self) -> dict[str, Any]:
            # These classes save no code: the entry would point to no file. It is kept in memory,
            # where vLLM's transformers backend looks for the classes of a folder that has code.
            return {k: v for k, v in super().to_dict().items() if k != "auto_map"}

    _publish(ConvertedConfig, dense_config)
    return ConvertedClasses(
        ConvertedConfig,
        _converted_model(family, ConvertedConfig, dense_backbone),
        _converted_model(family, ConvertedConfig, dense_model),
    )


def _converted_model(
    family: Family, config: type[PreTrainedConfig], dense: type[PreTrainedModel]
) -> type[PreTrainedModel]:
    class ConvertedModel(_WithoutCode, dense):  # type: ignore[valid-type, misc]
        config_class = config
        # Graphs end at each FFN, see MoEFeedForward.forward.
        _can_compile_fullgraph = False

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            replace_ffns(self, family, config)

    _publish(ConvertedModel, dense)
    return ConvertedModel


def _publish(cls: type, base: type) -> None:
    """Name a class after its dense one and make it an attribute of this module."""
    cls.__name__ = cls.__qualname__ = f"Weaver{base.__name__}"
    cls.__module__ = __name__
    globals()[cls.__name__] = cls


CONVERTED: dict[str, ConvertedClasses] = {
    family.model_type: _converted_classes(family) for family in ALL_FAMILIES.values()
}


def model_classes(config: PreTrainedConfig) -> ConvertedClasses:
    """The converted classes of a configuration's family, converted itself or not."""
    return CONVERTED[config.model_type.removeprefix(CONVERTED_PREFIX)]


def model_class(config: PreTrainedConfig, family: Family) -> type[PreTrainedModel]:
    """The causal LM of a configuration."""
    if config.model_type.startswith(CONVERTED_PREFIX):
        return model_classes(config).causal_lm
    found: type[PreTrainedModel] = getattr(transformers, family.causal_lm)
    return found


def converted_config(
    dense: PreTrainedConfig, layers: Sequence[AnyShape], recipe: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model: the dense one plus ``weaver: {layers, recipe}``.

    Where weaver made the model that is converted, its recipe stays as ``outer_recipe``.

    Args:
        dense: configuration of the model that was converted.
        layers: shape of every converted layer.
        recipe: the resolved configuration of every stage.
    """
    classes = model_classes(dense)
    values = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "quantization_config"):
        values.pop(key, None)
    before = values.get("weaver")
    values["weaver"] = {
        "layers": [layer.to_dict() for layer in layers],
        "first_tokens": FIRST_TOKENS,
        "early_tokens": EARLY_TOKENS,
        "recipe": recipe,
    }
    if before is not None:
        values["weaver"]["outer_recipe"] = before["recipe"]
    return classes.config(**values, architectures=[classes.causal_lm.__name__])


def register() -> None:
    """Register every converted family with transformers' Auto classes (may be called again)."""
    for classes in CONVERTED.values():
        AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)
        AutoModel.register(classes.config, classes.backbone, exist_ok=True)
        AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
