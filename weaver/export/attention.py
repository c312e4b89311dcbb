"""Everything of a decoder outside its FFNs: which stock architectures hold it, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from weaver.artifacts.store import read_json, write_json
from weaver.export.base import Obstacle
from weaver.models.converted_folder import ConvertedCheckpoint
from weaver.models.writing import Part
from weaver.models.writing import save_config as write_config

# Families whose decoder layer is norm, attention, residual, norm, FFN, residual, with separate
# projections and rotary embeddings over the whole head; and what keeps the others out.
PRE_NORM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_REASONS = {
    "gemma": "its embeddings are scaled and its norms multiply by 1 + weight",
    "gemma2": "it has four norms per layer, soft caps and alternating windows",
    "gemma3_text": "it has four norms per layer, alternating windows and two rotary bases",
    "olmo2": "its norms stand behind attention and FFN",
    "phi3": "its projections are fused and its rotary embedding may cover a part of the head",
}
_COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("attention_dropout", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def head_dim(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    named: int | None = getattr(config, "head_dim", None)
    return named or int(config.hidden_size // config.num_attention_heads)


def has_qk_norm(config: PreTrainedConfig) -> bool:
    """Queries and keys are normalised per head."""
    return config.model_type == "weaver_qwen3"


def has_qkv_bias(config: PreTrainedConfig) -> bool:
    """Queries, keys and values have biases."""
    return config.model_type == "weaver_qwen2" or bool(getattr(config, "attention_bias", False))


def has_output_projection_bias(config: PreTrainedConfig) -> bool:
    """The attention's output projection has a bias."""
    return config.model_type != "weaver_qwen2" and bool(getattr(config, "attention_bias", False))


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a token sees at most, where that is less than the context."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is None or window >= config.max_position_embeddings:
        return None
    return int(window) if "sliding_attention" in kinds else None


def decoder_obstacles(checkpoint: ConvertedCheckpoint) -> list[Obstacle]:
    """List a decoder's obstacles to every stock target: family, sliding window and activation."""
    family, own = checkpoint.family.model_type, "--to weaver"
    if family not in PRE_NORM_FAMILIES:
        why = f"no stock Mixture-of-Experts model is built like it: {_REASONS[family]}"
        return [Obstacle(f"the decoder of {family}", why, own)]
    found = []
    window = sliding_window(checkpoint.config)
    if window is not None:
        found.append(
            Obstacle(
                f"a sliding window of {window} tokens",
                "the target's attention sees the whole context",
                own,
                approximation=f"a context of {window} tokens, within which both are the same",
            )
        )
    if checkpoint.activation != "silu":
        found.append(
            Obstacle(f"the activation {checkpoint.activation}", "runtimes expect SiLU here", own)
        )
    return found


def decoder_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Configuration entries of a decoder outside its FFNs, for a stock config class."""
    values = {name: getattr(config, name) for name in _COPIED if hasattr(config, name)}
    values["head_dim"] = head_dim(config)
    window = sliding_window(config)
    if window is not None:
        values["max_position_embeddings"] = window
    values["rope_parameters"] = dict(config.rope_parameters)
    values["hidden_act"] = "silu"
    values["attention_bias"] = has_qkv_bias(config)
    return values


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write ``config.json``, rotary settings also where other readers look for them.

    transformers 5 keeps them in ``rope_parameters`` alone. Earlier releases and runtimes with their
    own reader want ``rope_theta`` and ``partial_rotary_factor`` beside it; without the latter,
    ``glm4_moe`` would rotate half of every head.
    """
    write_config(config, folder)
    path = folder / "config.json"
    values = read_json(path, rebuild="rerun weaver export with --force")
    rope = dict(config.rope_parameters)
    values["rope_theta"] = rope["rope_theta"]
    values["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
    write_json(path, values)


def outer_part(checkpoint: ConvertedCheckpoint, dtype: torch.dtype, *, tied: bool) -> Part:
    """Embeddings, last norm and output head.

    Args:
        checkpoint: the converted model.
        dtype: of the written tensors.
        tied: leave tied embeddings tied. Otherwise the head is written out: some runtimes do not
            look for it in the embeddings.
    """
    sources = {name: name for name in checkpoint.outer_names()}
    if not tied:
        sources.setdefault("lm_head.weight", "model.embed_tokens.weight")
    return Part(
        {name: checkpoint.elements(source) * dtype.itemsize for name, source in sources.items()},
        lambda: {name: checkpoint.tensor(source).to(dtype) for name, source in sources.items()},
    )


def layer_rest(
    checkpoint: ConvertedCheckpoint, layer: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Norms and attention of a decoder layer, under their own names."""
    return {name: checkpoint.tensor(name).to(dtype) for name in checkpoint.layer_names(layer)}


def rest_sizes(checkpoint: ConvertedCheckpoint, layer: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of ``layer_rest``."""
    names = checkpoint.layer_names(layer)
    return {name: checkpoint.elements(name) * dtype.itemsize for name in names}


def sizes(shapes: dict[str, Sequence[int]], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of tensors of these shapes."""
    return {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
