"""Converted models as Hugging Face models: one config and one class per family, registered.

``import weaver`` runs ``register()``; afterwards ``AutoModelForCausalLM.from_pretrained`` loads a
converted model. Each class is the family's own causal LM with the FFNs replaced, so attention,
caches, ``generate``, padding, device maps and saving are transformers' own.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from weaver.models.accounting import LayerShape
from weaver.models.families import FAMILIES, Family, activation_name
from weaver.models.moe import MoEFeedForward


def replace_ffns(model: PreTrainedModel, family: Family, config: PreTrainedConfig) -> None:
    """Put a ``MoEFeedForward`` in place of every FFN, shaped as ``config.weaver`` says."""
    activation = activation_name(getattr(config, family.activation_field), model=config.model_type)
    layers = model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for layer, entry in zip(layers, config.weaver["layers"], strict=True):
        setattr(
            layer,
            family.ffn,
            MoEFeedForward(
                LayerShape(**entry), config.hidden_size, activation, std=config.initializer_range
            ),
        )


def _converted_classes(family: Family) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    dense_model: type[PreTrainedModel] = getattr(transformers, family.causal_lm)
    dense_config = dense_model.config_class
    assert dense_config is not None

    class ConvertedConfig(dense_config):  # type: ignore[valid-type, misc]
        model_type = family.converted_model_type
        # The converted FFN has no gate_proj, up_proj or down_proj to shard by name.
        base_model_tp_plan = None

    class ConvertedModel(dense_model):  # type: ignore[valid-type, misc]
        config_class = ConvertedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            replace_ffns(self, family, config)

    for cls, base in ((ConvertedConfig, dense_config), (ConvertedModel, dense_model)):
        cls.__name__ = cls.__qualname__ = f"Weaver{base.__name__}"
        cls.__module__ = __name__
        globals()[cls.__name__] = cls
    return ConvertedConfig, ConvertedModel


CONVERTED: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    family.model_type: _converted_classes(family) for family in FAMILIES.values()
}


def converted_config(
    dense: PreTrainedConfig, layers: list[LayerShape], recipe: dict[str, Any]
) -> PreTrainedConfig:
    """Config of the converted model: the dense one plus ``weaver: {layers, recipe}``."""
    config_class, model_class = CONVERTED[dense.model_type]
    values = dense.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "quantization_config"):
        values.pop(key, None)
    values["weaver"] = {"layers": [layer.to_dict() for layer in layers], "recipe": recipe}
    return config_class(**values, architectures=[model_class.__name__])


def register() -> None:
    """Register every converted family with transformers' Auto classes (may be called again)."""
    for config_class, model_class in CONVERTED.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
