"""The next-token loss with bounded memory for the logits."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Float32 logits held at once; with a vocabulary of 49,152 this is 682 tokens.
LOGIT_BYTES = 128 * 2**20


def next_token_loss(
    model: PreTrainedModel, ids_BT: Tensor, *, logit_bytes: int = LOGIT_BYTES
) -> Tensor:
    """Mean cross entropy of each window's tokens 1..T-1 given those before, in float32.

    loss = -(1 / (B * (T - 1))) * sum_b sum_{t>=1} log softmax(z_b,t-1)[id_b,t]

    The backbone runs once; the language-model head runs on chunks of tokens and is recomputed in
    the backward pass, so that never more than ``logit_bytes`` of float32 logits exist.

    Args:
        model: a causal language model with ``base_model`` and output embeddings.
        ids_BT: token ids, int64, (B, T), T at least 2; no padding.
        logit_bytes: upper limit of one chunk's float32 logits (one token at least).

    Returns:
        The loss in nats, float32, ().

    Raises:
        ValueError: T is below 2, or the model has no output embeddings.

    Known deviation: of what models do after the head only ``final_logit_softcapping`` (Gemma 2) is
    applied; no supported family does anything else.
    """
    if ids_BT.shape[1] < 2:
        raise ValueError(f"windows of {ids_BT.shape[1]} token(s) predict nothing")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings")
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    hidden_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
    targets_N = ids_BT[:, 1:].reshape(-1)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    chunk = max(1, logit_bytes // (4 * model.config.get_text_config().vocab_size))
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True):
        part = checkpoint(_chunk_loss, head, hidden_CD, targets_C, softcap, use_reentrant=False)
        total = total + cast(Tensor, part)
    return cast(Tensor, total / targets_N.numel())


def _chunk_loss(
    head: nn.Module, hidden_CD: Tensor, targets_C: Tensor, softcap: float | None
) -> Tensor:
    logits_CV = head(hidden_CD).float()
    if softcap is not None:
        logits_CV = softcap * torch.tanh(logits_CV / softcap)
    return functional.cross_entropy(logits_CV, targets_C, reduction="sum")
