"""A stock ``glm4_moe`` model as a GGUF file, which llama.cpp runs as architecture ``glm4moe``.

Both compute the same: sigmoid scores, a bias in the selection only, weights normalised over the
selected experts and scaled, one shared expert. Queries and keys need no permutation, since
llama.cpp rotates this architecture's heads by halves, as transformers does. Two differences:
llama.cpp requires a shared expert (one of zeros is written where there is none), and it takes no
factors per frequency, so that of the kinds of rope scaling only the linear one is passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PreTrainedConfig

from weaver.artifacts.store import atomic_path
from weaver.errors import WeaverError
from weaver.export.attention import head_dim
from weaver.export.gguf_layout import TensorPlan, plan_tensors, shared_experts
from weaver.export.gguf_tokenizer import Vocabulary, read_vocabulary
from weaver.models.writing import Part

ARCHITECTURE = "glm4moe"
QUANTISATIONS: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# llama.cpp stops with an assertion above it.
MAX_EXPERTS = 512
_F16_MAX = 65504.0


def write_gguf(
    path: Path,
    config: PreTrainedConfig,
    parts: Sequence[Part],
    tokenizer_folder: Path,
    *,
    quantisation: str,
    name: str,
    on_part: Callable[[str], None],
) -> None:
    """Write a stock ``glm4_moe`` model as one GGUF file, which appears when it is complete.

    The header, with the place of every tensor, is written first, from the shapes that the
    configuration implies; then the parts follow one by one, so that one is in memory at a time and
    nothing is written twice.

    Args:
        path: the file to write; one that exists is replaced.
        config: a ``Glm4MoeConfig`` without dense or MTP layers and with one expert group.
        parts: tensors under the names of the hub's checkpoints, a layer's experts in one part.
        tokenizer_folder: holds the model's tokenizer.
        quantisation: f32, f16, bf16 or q8_0, of the matrices. Norms, biases and the router stay
            f32 (the router's rows are scaled by small powers of two). With q8_0, matrices whose
            rows do not divide into blocks of 32 are f16.
        name: of the model, inside the file.
        on_part: told which part was written.

    Raises:
        WeaverError: the quantisation is unknown or does not hold a value, llama.cpp cannot run
            such a model or has no such tokenizer, or the file cannot be written.
        ValueError: the parts are not a ``glm4_moe`` model of this configuration.
    """
    kind, file_type = _quantisation(quantisation)
    vocabulary = check_gguf(config, tokenizer_folder)
    plans = plan_tensors(config, parts, kind)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            _write_header(writer, config, vocabulary, name, file_type, plans)
            for part, plan in zip(parts, plans, strict=True):
                tensors = part.load()
                for planned in plan:
                    writer.write_tensor_data(_values(planned, tensors))
                on_part(f"{len(plan)} tensors from {plan[0].name}")
        finally:
            writer.close()


def check_gguf(config: PreTrainedConfig, tokenizer_folder: Path) -> Vocabulary:
    """See whether llama.cpp has a model and a tokenizer like these, before anything is written.

    Args:
        config: a ``Glm4MoeConfig``.
        tokenizer_folder: holds the model's tokenizer.

    Returns:
        The tokenizer as a GGUF file holds it.

    Raises:
        WeaverError: it has not; naming what it lacks.
    """
    _check_config(config)
    return read_vocabulary(tokenizer_folder, config.vocab_size)


def _quantisation(name: str) -> tuple[GGMLQuantizationType, LlamaFileType]:
    if name not in QUANTISATIONS:
        raise WeaverError(
            f"unknown quantisation {name!r}",
            why=f"weaver writes {', '.join(QUANTISATIONS)}; llama.cpp's llama-quantize makes the "
            "smaller ones out of these",
            fix="--quantisation q8_0",
        )
    return QUANTISATIONS[name]


def _check_config(config: PreTrainedConfig) -> None:
    if config.hidden_act != "silu":
        raise WeaverError(
            f"GGUF cannot hold the activation {config.hidden_act}",
            why=f"llama.cpp's {ARCHITECTURE} computes silu",
            fix="--to glm4-moe",
        )
    scaling = config.rope_parameters["rope_type"]
    if scaling not in ("default", "linear"):
        raise WeaverError(
            f"GGUF cannot hold rope scaling of type {scaling}",
            why=f"llama.cpp has no factors per frequency for {ARCHITECTURE}; linear scaling needs "
            "none and is all that weaver passes on",
            fix="--to glm4-moe",
        )
    if not 0 < config.num_experts_per_tok <= config.n_routed_experts <= MAX_EXPERTS:
        raise WeaverError(
            f"GGUF cannot hold {config.n_routed_experts} routed experts of which "
            f"{config.num_experts_per_tok} are selected",
            why=f"llama.cpp takes 1 to {MAX_EXPERTS} and selects at least one of them",
            fix="--to glm4-moe",
        )


def _write_header(
    writer: gguf.GGUFWriter,
    config: PreTrainedConfig,
    vocabulary: Vocabulary,
    name: str,
    file_type: LlamaFileType,
    plans: Sequence[Sequence[TensorPlan]],
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_experts(writer, config)
    vocabulary.add_to(writer)
    for planned in (tensor for plan in plans for tensor in plan):
        # With an explicit kind the dtype only says that the shape counts values and not bytes.
        values = np.dtype(np.float32)
        writer.add_tensor_info(planned.name, planned.shape, values, planned.size, planned.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    rope: Mapping[str, Any] = config.rope_parameters
    width = head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_experts(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(shared_experts(config))
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_nextn_predict_layers(0)


def _values(planned: TensorPlan, tensors: Mapping[str, Tensor]) -> Any:
    """The bytes of a tensor; experts are stacked."""
    stacked = len(planned.shape) == 3
    shape = planned.shape[1:] if stacked else planned.shape
    blocks = [
        _quantised(planned, source, tensors[source].float(), shape) for source in planned.sources
    ]
    return np.stack(blocks) if stacked else blocks[0]


def _quantised(planned: TensorPlan, source: str, values: Tensor, shape: Sequence[int]) -> Any:
    if values.numel() == 0 and "shared_experts" in source:
        values = torch.zeros(*shape)
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"{source} has shape {tuple(values.shape)}, {planned.name} needs {shape}")
    largest = float(values.abs().max())
    if planned.kind == GGMLQuantizationType.F16 and not largest <= _F16_MAX:
        raise WeaverError(
            f"{source} has a value of {largest:g}, and {planned.name} would be f16",
            why=f"f16 ends at {_F16_MAX:g}",
            fix="--quantisation bf16",
        )
    return gguf.quants.quantize(values.contiguous().numpy(), planned.kind)
