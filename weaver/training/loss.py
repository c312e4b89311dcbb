"""The training loss with bounded memory for the logits: next token, distillation, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# Float32 logits of one model held at once. On a CPU a tensor of up to 32 MiB gets memory that an
# earlier one has left, in glibc; a larger one gets new pages, whose first touch takes longer than
# the arithmetic: with 49,152 tokens in the vocabulary the loss of 160 positions took 0.9 ms each,
# that of 341 took 1.6.
CPU_LOGIT_BYTES = 30 * 2**20
LOGIT_BYTES = 128 * 2**20


def training_loss(
    model: PreTrainedModel,
    ids_BT: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    distill_weight: float = 1.0,
    logit_bytes: int | None = None,
) -> Tensor:
    """Mean loss over the positions t = 0..T-2 of every window, which predict a token, in float32.

    next token:    L_nt = -(1 / N) * sum_b sum_t log q_bt(id_b,t+1)
    distillation:  L_kl = (1 / N) * sum_b sum_t sum_v p_bt(v) * (log p_bt(v) - log q_bt(v))
    loss = L_nt without a teacher, else w * L_kl + (1 - w) * L_nt

    with ``N = B * (T - 1)``, q the model's and p the teacher's softmax, at temperature 1. L_kl is
    the KL(dense || converted) that ``weaver eval`` reports.

    Each backbone runs once, the teacher's without gradients. The language-model heads run once too,
    on chunks of tokens, each with its gradients before the next (``_ChunkedLoss``), so that never
    more than ``logit_bytes`` of a model's float32 logits exist.

    Args:
        model: a causal language model with ``base_model`` and output embeddings.
        ids_BT: token ids, int64, (B, T), T at least 2; no padding.
        teacher: the dense model, with the same vocabulary; None for the next-token loss.
        distill_weight: w, in (0, 1].
        logit_bytes: upper limit of one chunk's float32 logits (one token at least); what suits the
            model's device if left out.

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
    if logit_bytes is None:
        logit_bytes = CPU_LOGIT_BYTES if student.hidden_ND.device.type == "cpu" else LOGIT_BYTES
    size = max(1, logit_bytes // (4 * vocabulary))

    def chunk_loss(hidden_CD: Tensor, chunk: slice) -> Tensor:
        return _chunk_loss(student, hidden_CD, targets_N[chunk], dense, chunk, distill_weight)

    trained = [each for each in student.head.parameters() if each.requires_grad]
    total: Tensor = _ChunkedLoss.apply(chunk_loss, size, student.hidden_ND, *trained)  # type: ignore[no-untyped-call]
    return total / targets_N.numel()


class _ChunkedLoss(torch.autograd.Function):
    """A sum over chunks of positions whose gradients are taken on the way forward.

    A graph over all chunks would hold all logits; without one, the backward pass would have to run
    both heads a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chunk_loss: Callable[[Tensor, slice], Tensor],
        size: int,
        hidden_ND: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        """The sum in float32, (); ``trained`` are the parameters that ``chunk_loss`` reads."""
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(each) for each in (hidden_ND, *trained)]
        for start in range(0, hidden_ND.shape[0], size):
            chunk = slice(start, start + size)
            with torch.enable_grad():
                hidden_CD = hidden_ND[chunk].detach().requires_grad_()
                part = chunk_loss(hidden_CD, chunk)
            total += part.detach()
            of_hidden_CD, *of_trained = torch.autograd.grad(part, (hidden_CD, *trained))
            gradients[0][chunk] = of_hidden_CD
            for gradient, found in zip(gradients[1:], of_trained, strict=True):
                gradient.add_(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Of the hidden states and the parameters."""
        return (None, None, *(outer[0] * gradient for gradient in ctx.saved_tensors))


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
