"""Tiny random models of the stock architecture ``glm4_moe``, and the parts of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from weaver.models.writing import Part

NUM_EXPERTS, ALWAYS, NEVER = 8, 2, 5

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "attention_bias": True,
    "use_qk_norm": True,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 3.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def stock_config(**changes: Any) -> Glm4MoeConfig:
    """A configuration as the export to ``glm4_moe`` makes them."""
    return Glm4MoeConfig(**(_DEFAULTS | changes))


def stock_model(*, seed: int = 0, **changes: Any) -> Glm4MoeForCausalLM:
    """A random model in float32 with small router rows and a forced and a null expert."""
    generator = torch.Generator().manual_seed(seed)
    model = Glm4MoeForCausalLM(stock_config(**changes))

    def noise(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = 0.3 if parameter.dim() == 1 else max(1, parameter.shape[-1]) ** -0.5
            scale *= 2.0**-8 if name.endswith("mlp.gate.weight") else 1.0
            parameter.copy_(scale * noise(parameter.shape) + ("norm" in name))
        for layer in model.model.layers:
            bias_E = 1e-3 * noise(torch.Size([model.config.n_routed_experts]))
            bias_E[ALWAYS], bias_E[NEVER] = 16.0, -16.0
            layer.mlp.gate.e_score_correction_bias.copy_(bias_E)
    model.eval()
    return model


def stock_tensors(model: Glm4MoeForCausalLM) -> dict[str, Tensor]:
    """The tensors under the names of the hub's checkpoints: each expert has its own."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            for expert, down in enumerate(value):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = value
    return tensors


def as_parts(tensors: dict[str, Tensor], on_load: Callable[[str], object] = str) -> list[Part]:
    """One part per layer, behind one for what lies outside them.

    Args:
        tensors: under the names of the hub's checkpoints.
        on_load: told the name of a part that is loaded.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        groups.setdefault(group, {})[name] = value

    def part(group: str) -> Part:
        def load() -> dict[str, Tensor]:
            on_load(group)
            return groups[group]

        return Part({name: value.nbytes for name, value in groups[group].items()}, load)

    return [part(group) for group in groups]


def stock_parts(model: Glm4MoeForCausalLM) -> list[Part]:
    """``as_parts`` of a whole model."""
    return as_parts(stock_tensors(model))
