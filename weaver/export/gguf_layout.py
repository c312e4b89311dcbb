"""Which tensors a GGUF file of a ``glm4_moe`` model has, and what each is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType
from transformers import PreTrainedConfig

from weaver.export.attention import head_dim
from weaver.models.writing import Part

# Shape and sources by name.
_Tensors = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the file.

    Args:
        name: in the file.
        shape: numbers of values, rows last; with three dimensions the first counts experts.
        kind: type of the values.
        sources: names of the stock tensors that it is made of: one, or one per expert.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    sources: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        values, block = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // values * block


def plan_tensors(
    config: PreTrainedConfig, parts: Sequence[Part], kind: GGMLQuantizationType
) -> list[list[TensorPlan]]:
    """Plan the GGUF tensors that are made from each part, in the order of the file.

    Args:
        config: of the stock model.
        parts: its tensors.
        kind: of the matrices, except the router and those whose rows it cannot hold.

    Returns:
        One list of tensors per part.

    Raises:
        ValueError: the parts are not the tensors of such a model.
    """
    owner = {name: i for i, part in enumerate(parts) for name in part.sizes}
    plans: list[list[TensorPlan]] = [[] for _ in parts]
    for name, (shape, sources) in _tensors(config).items():
        owners = {owner.pop(source, -1) for source in sources}
        if -1 in owners or len(owners) > 1:
            raise ValueError(f"{name} needs {', '.join(sources)} in one part")
        plans[owners.pop()].append(TensorPlan(name, shape, _kind(name, shape, kind), sources))
    if owner or not all(plans):
        raise ValueError(f"not of this glm4_moe model: {', '.join(owner) or 'an empty part'}")
    return plans


def shared_experts(config: PreTrainedConfig) -> int:
    """Shared experts in the file: without any, llama.cpp would add silu(x) to the routed sum."""
    return max(1, int(config.n_shared_experts))


def _kind(name: str, shape: Sequence[int], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return GGMLQuantizationType.F32
    values, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % values == 0 else GGMLQuantizationType.F16


def _tensors(config: PreTrainedConfig) -> _Tensors:
    matrix = (config.vocab_size, config.hidden_size)
    tensors: _Tensors = {
        "token_embd.weight": (matrix, ("model.embed_tokens.weight",)),
        "output_norm.weight": ((config.hidden_size,), ("model.norm.weight",)),
        "output.weight": (matrix, ("lm_head.weight",)),
    }
    for layer in range(config.num_hidden_layers):
        for name, (shape, sources) in (_attention(config) | _ffn(config)).items():
            own = tuple(f"model.layers.{layer}.{source}" for source in sources)
            tensors[f"blk.{layer}.{name}"] = (shape, own)
    return tensors


def _attention(config: PreTrainedConfig) -> _Tensors:
    hidden, width = config.hidden_size, head_dim(config)
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    tensors: _Tensors = {
        "attn_norm.weight": ((hidden,), ("input_layernorm.weight",)),
        "post_attention_norm.weight": ((hidden,), ("post_attention_layernorm.weight",)),
        "attn_output.weight": ((hidden, queries), ("self_attn.o_proj.weight",)),
    }
    for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
        source = f"self_attn.{letter}_proj"
        tensors[f"attn_{letter}.weight"] = ((rows, hidden), (f"{source}.weight",))
        if config.attention_bias:
            tensors[f"attn_{letter}.bias"] = ((rows,), (f"{source}.bias",))
    if config.use_qk_norm:
        for letter in ("q", "k"):
            source = f"self_attn.{letter}_norm.weight"
            tensors[f"attn_{letter}_norm.weight"] = ((width,), (source,))
    return tensors


def _ffn(config: PreTrainedConfig) -> _Tensors:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    experts, shared = config.n_routed_experts, width * shared_experts(config)
    tensors: _Tensors = {
        "ffn_gate_inp.weight": ((experts, hidden), ("mlp.gate.weight",)),
        "exp_probs_b.bias": ((experts,), ("mlp.gate.e_score_correction_bias",)),
    }
    for name in ("gate", "up", "down"):
        one = (hidden, width) if name == "down" else (width, hidden)
        all_shared = (hidden, shared) if name == "down" else (shared, hidden)
        sources = tuple(f"mlp.experts.{e}.{name}_proj.weight" for e in range(experts))
        tensors[f"ffn_{name}_exps.weight"] = ((experts, *one), sources)
        source = f"mlp.shared_experts.{name}_proj.weight"
        tensors[f"ffn_{name}_shexp.weight"] = (all_shared, (source,))
    return tensors
