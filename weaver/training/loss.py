"""The training loss with bounded memory for the logits: next token, distillation, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Float32 logits held at once; with a vocabulary of 49,152 this is 682 tokens, 341 with a teacher.
LOGIT_BYTES = 128 * 2**20


def training_loss(
    model: PreTrainedModel,
    ids_BT: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    distill_weight: float = 1.0,
    logit_bytes: int = LOGIT_BYTES,
) -> Tensor:
    """Mean loss over the positions t = 0..T-2 of every window, which predict a token, in float32.

    next token:    L_nt = -(1 / N) * sum_b sum_t log q_bt(id_b,t+1)
    distillation:  L_kl = (1 / N) * sum_b sum_t sum_v p_bt(v) * (log p_bt(v) - log q_bt(v))
    loss = L_nt without a teacher, else w * L_kl + (1 - w) * L_nt

    with ``N = B * (T - 1)``, q the model's and p the teacher's softmax, at temperature 1. L_kl is
    the KL(dense || converted) that ``weaver eval`` reports.

    Each backbone runs once, the teacher's without gradients; the language-model heads run on chunks
    of tokens and are recomputed in the backward pass, so that never more than ``logit_bytes`` of
    float32 logits exist, those of both models counted.

    Args:
        model: a causal language model with ``base_model`` and output embeddings.
        ids_BT: token ids, int64, (B, T), T at least 2; no padding.
        teacher: the dense model, with the same vocabulary; None for the next-token loss.
        distill_weight: w, in (0, 1].
        logit_bytes: upper limit of one chunk's float32 logits (one token at least).

    Returns:
        The loss in nats per token, float32, ().

    Raises:
        ValueError: T is below 2, a model has no output embeddings, w is out of range, or the
            vocabularies differ.

    Known deviation: of what models do after the head only ``final_logit_softcapping`` (Gemma 2) is
    applied; no supported family does anything else.
    """
    if ids_BT.shape[1] < 2:
        raise ValueError(f"windows of {ids_BT.shape[1]} token(s) predict nothing")
    if not 0 < distill_weight <= 1:
        raise ValueError(f"distill_weight={distill_weight} is not in (0, 1]")
    vocabulary = _vocabulary(model)
    if teacher is not None and _vocabulary(teacher) != vocabulary:
        raise ValueError(f"vocabularies of {vocabulary} and {_vocabulary(teacher)} tokens differ")
    student, dense = _Predictions.of(model, ids_BT), None
    if teacher is not None:
        with torch.no_grad():
            dense = _Predictions.of(teacher, ids_BT.to(teacher.device))
    targets_N = ids_BT[:, 1:].reshape(-1)
    models = 1 if dense is None else 2
    size = max(1, logit_bytes // (4 * vocabulary * models))
    total = student.hidden_ND.new_zeros((), dtype=torch.float32)
    for start in range(0, targets_N.numel(), size):
        chunk = slice(start, start + size)
        hidden_CD, targets_C = student.hidden_ND[chunk], targets_N[chunk]
        # The slice is an argument, so that the graph before it is kept and not recomputed.
        part = checkpoint(
            _chunk_loss,
            *(student, hidden_CD, targets_C, dense, chunk, distill_weight),
            use_reentrant=False,
        )
        total = total + part
    return total / targets_N.numel()


@dataclass(frozen=True)
class _Predictions:
    """What a model says at N positions, up to its head.

    Args:
        hidden_ND: hidden states after the final norm, (N, D).
        head: hidden states to logits.
        softcap: limit of the logits, or None.
    """

    hidden_ND: Tensor
    head: nn.Module
    softcap: float | None

    @classmethod
    def of(cls, model: PreTrainedModel, ids_BT: Tensor) -> Self:
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings")
        hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD[:, :-1].reshape(-1, hidden_BTD.shape[-1])
        return cls(hidden_ND, head, getattr(model.config, "final_logit_softcapping", None))

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Float32 logits of some of the positions, (C, V)."""
        logits_CV: Tensor = self.head(hidden_CD).float()
        if self.softcap is not None:
            logits_CV = self.softcap * torch.tanh(logits_CV / self.softcap)
        return logits_CV


def _chunk_loss(
    student: _Predictions,
    hidden_CD: Tensor,
    targets_C: Tensor,
    dense: _Predictions | None,
    chunk: slice,
    distill_weight: float,
) -> Tensor:
    """Sum of the loss over a chunk of positions."""
    logits_CV = student.logits(hidden_CD)
    if dense is None:
        return functional.cross_entropy(logits_CV, targets_C, reduction="sum")
    with torch.no_grad():
        log_p_CV = dense.logits(dense.hidden_ND[chunk]).log_softmax(-1).to(logits_CV.device)
    log_q_CV = logits_CV.log_softmax(-1)
    loss = functional.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True)
    if distill_weight < 1:
        next_token = functional.nll_loss(log_q_CV, targets_C, reduction="sum")
        loss = distill_weight * loss + (1 - distill_weight) * next_token
    return loss


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size
