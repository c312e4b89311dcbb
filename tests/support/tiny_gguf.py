"""A tiny Llama as a GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADS = 4
KEY_VALUE_HEADS = 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of GGUF: the two halves that rotate together become neighbours."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_tensors(writer: gguf.GGUFWriter, model: LlamaForCausalLM) -> None:
    """Write the weights, and put into ``model`` the values that their Q8_0 blocks stand for."""

    def add(name: str, parameter: Tensor, heads: int | None = None) -> None:
        if parameter.dim() == 1:
            writer.add_tensor(name, parameter.detach().numpy())
            return
        blocks = gguf.quants.quantize(parameter.detach().numpy(), GGMLQuantizationType.Q8_0)
        values = gguf.quants.dequantize(blocks, GGMLQuantizationType.Q8_0)
        parameter.data.copy_(torch.from_numpy(values))
        stored = blocks if heads is None else interleave_rotary(blocks, heads)
        writer.add_tensor(name, stored, raw_dtype=GGMLQuantizationType.Q8_0)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    if not model.config.tie_word_embeddings:
        add("output.weight", model.lm_head.weight)
    heads = {"attn_q": HEADS, "attn_k": KEY_VALUE_HEADS}
    for index, layer in enumerate(model.model.layers):
        for module, name in NAMES.items():
            weight = layer.get_parameter(f"{module}.weight")
            add(f"blk.{index}.{name}.weight", weight, heads.get(name))


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(259)))
    # The format has no empty array, so there is one merge and its product.
    writer.add_token_list([*tokens, "qz"])
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["q z"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(258)
    write_tensors(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
