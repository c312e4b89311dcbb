"""From token ids to hidden states, and from those to logits, a part of the tokens at a time.

With V = 262144 (Gemma 3) and T = 2048 the full float32 logits of one window take 2 GiB, and
log-softmax needs as much again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Float32 logits that one chunk of tokens may take. On a CPU a tensor of up to 32 MiB gets memory
# that an earlier one has left, in glibc; a larger one gets new pages, whose first touch takes
# longer than the arithmetic: with 49,152 tokens in the vocabulary the loss of 160 positions took
# 0.9 ms each, that of 341 took 1.6.
CPU_LOGIT_BYTES = 30 * 2**20
LOGIT_BYTES = 128 * 2**20


def chunk_tokens(model: PreTrainedModel) -> int:
    """How many tokens to project at once on the model's device, one at least."""
    limit = CPU_LOGIT_BYTES if model.device.type == "cpu" else LOGIT_BYTES
    return max(1, limit // (4 * vocabulary(model)))


def vocabulary(model: PreTrainedModel) -> int:
    """V, the number of token ids that the model tells apart."""
    size: int = model.config.get_text_config().vocab_size
    return size


def final_hidden(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    *,
    position_ids_BT: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Hidden states after the final norm, (B, T, D): what the output head reads.

    Args:
        model: a causal LM with a backbone of its own (``model.base_model``).
        input_ids_BT: token ids, int64, (B, T).
        position_ids_BT: positions, int64, (B, T); 0..T-1 when left out.
        attention_mask: additive mask, (B, 1, T, T); causal when left out.
    Raises:
        ValueError: the model is a bare backbone or has no output head.
    """
    if model.base_model is model or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is not a causal LM with an output head")
    output = model.base_model(
        input_ids=input_ids_BT.to(model.device),
        position_ids=position_ids_BT,
        attention_mask=attention_mask,
        use_cache=False,
    )
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD


def project(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Logits of some hidden states in float32, (N, V), as the model's own forward gives them.

    ``z = hidden W_out^T``, and with Gemma 2's soft cap c ``z = c * tanh(z / c)``, computed in the
    model's dtype as there. No supported family does anything else after the head.
    """
    logits_NV: Tensor = model.get_output_embeddings()(hidden_ND)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV.float()
