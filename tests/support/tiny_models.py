"""One tiny random model per family, with everything about the family that can go wrong.

Four query heads share two key-value heads, sliding windows are shorter than the test windows, and
every parameter is random: a norm left at one or a bias left at zero would hide a mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from weaver.models.families import ALL_FAMILIES

PAD_ID = 258
HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS, VOCABULARY = 32, 48, 3, 260
SLIDING_WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": PAD_ID,
}
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA_2: dict[str, Any] = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": _SLIDING_THEN_FULL,
}

# Variant names: the family's model type, and what is special after a plus sign.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama+bias": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "olmo2": {},
    "phi3": {"sliding_window": SLIDING_WINDOW},
}

# Models that are Mixtures of Experts already: two layers, four experts, two of them a token.
NUM_EXPERTS, EXPERT_SIZE = 4, 24
_EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
TINY_MOE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_EXPERTS,
        "num_experts": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_SIZE,
        "shared_expert_intermediate_size": 40,
    },
    # Its first layer is dense, of 48 neurons.
    "qwen3_moe": {
        **_EXPERTS,
        "num_experts": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_SIZE,
        "head_dim": 8,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "mixtral": {**_EXPERTS, "num_local_experts": NUM_EXPERTS, "intermediate_size": EXPERT_SIZE},
    "olmoe": {**_EXPERTS, "num_experts": NUM_EXPERTS, "intermediate_size": EXPERT_SIZE},
    # As above; experts in two groups, of which a token uses one.
    "glm4_moe": {
        **_EXPERTS,
        "n_routed_experts": NUM_EXPERTS,
        "moe_intermediate_size": EXPERT_SIZE,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 16,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 1.5,
        "num_mtp_layers": 0,
    },
}


def model_type(variant: str) -> str:
    """The family of a variant."""
    return variant.partition("+")[0]


def tiny_config(variant: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of a variant."""
    model_class = getattr(transformers, ALL_FAMILIES[model_type(variant)].causal_lm)
    config: PreTrainedConfig = model_class.config_class(
        **(_COMMON | (TINY | TINY_MOE)[variant] | changes)
    )
    return config


def tiny_model(variant: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a variant, in float32 and evaluation mode."""
    config = tiny_config(variant, **changes)
    model: PreTrainedModel = getattr(transformers, ALL_FAMILIES[model_type(variant)].causal_lm)(
        config
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # Matrices keep their input's scale, so that no layer drowns or drowns out the others.
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise if _is_norm(name) else noise)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.eval()
    return model


def save_tiny_model(
    variant: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Write a tiny model with its tokenizer as a folder.

    Args:
        variant: a key of ``TINY`` or ``TINY_MOE``.
        folder: where to.
        tokenizer: the tokenizer, of at most ``VOCABULARY`` tokens.
        dtype: dtype of the stored weights.
        max_shard_size: as of ``save_pretrained``; None writes one file.
        **changes: fields of the configuration that differ from the variant's.

    Returns:
        The model as it was saved.
    """
    model = tiny_model(variant, **changes)
    torch.nn.Module.to(model, dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size or "5GB")
    tokenizer.save_pretrained(folder)
    return model


def random_ids(windows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens, (W, T)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (windows, length), generator=generator)


def _causal_lm(variant: str) -> Any:
    return getattr(transformers, ALL_FAMILIES[model_type(variant)].causal_lm)


def _is_norm(name: str) -> bool:
    return "norm" in name
