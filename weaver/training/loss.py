"""The training loss with bounded memory for the logits: next token, distillation, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from weaver.models.output_head import chunk_tokens, final_hidden, project, vocabulary


def training_loss(
    model: PreTrainedModel,
    ids_BT: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    distill_weight: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Mean loss over the positions t = 0..T-2 of every window, which predict a token, in float32.

    next token:    L_nt = -(1 / N) * sum_b sum_t log q_bt(id_b,t+1)
    distillation:  L_kl = (1 / N) * sum_b sum_t sum_v p_bt(v) * (log p_bt(v) - log q_bt(v))
    loss = L_nt without a teacher, else w * L_kl + (1 - w) * L_nt

    with ``N = B * (T - 1)``, q the model's and p the teacher's softmax, at temperature 1. L_kl is
    the KL(dense || converted) that ``weaver eval`` reports.

    Each backbone runs once, the teacher's without gradients. The language-model heads run once too,
    on chunks of tokens, each with its gradients before the next (``_ChunkedLoss``), so that never
    the logits of more than one chunk exist.

    Args:
        model: a causal language model with ``base_model`` and output embeddings.
        ids_BT: token ids, int64, (B, T), T at least 2; no padding.
        teacher: the dense model, with the same vocabulary; None for the next-token loss.
        distill_weight: w, in (0, 1].
        chunk: tokens per chunk; what suits the model's device if left out.

    Returns:
        The loss in nats per token, float32, ().

    Raises:
        ValueError: T is below 2, a model has no output embeddings, w is out of range, or the
            vocabularies differ.
    """
    if ids_BT.shape[1] < 2:
        raise ValueError(f"windows of {ids_BT.shape[1]} token(s) predict nothing")
    if not 0 < distill_weight <= 1:
        raise ValueError(f"distill_weight={distill_weight} is not in (0, 1]")
    if teacher is not None and vocabulary(teacher) != vocabulary(model):
        sizes = f"{vocabulary(model)} and {vocabulary(teacher)}"
        raise ValueError(f"vocabularies of {sizes} tokens differ")
    hidden_ND, dense_ND = _predicting(model, ids_BT), None
    if teacher is not None:
        with torch.no_grad():
            dense_ND = _predicting(teacher, ids_BT)
    targets_N = ids_BT[:, 1:].reshape(-1)

    def chunk_loss(hidden_CD: Tensor, part: slice) -> Tensor:
        logits_CV, targets_C = project(model, hidden_CD), targets_N[part]
        if teacher is None or dense_ND is None:
            return functional.cross_entropy(logits_CV, targets_C, reduction="sum")
        with torch.no_grad():
            dense_CV = project(teacher, dense_ND[part]).to(logits_CV.device)
        return _distillation(logits_CV, dense_CV, targets_C, distill_weight)

    size = chunk_tokens(model) if chunk is None else chunk
    head = model.get_output_embeddings().parameters()
    trained = [parameter for parameter in head if parameter.requires_grad]
    total: Tensor = _ChunkedLoss.apply(chunk_loss, size, hidden_ND, *trained)  # type: ignore[no-untyped-call]
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
            part = slice(start, start + size)
            with torch.enable_grad():
                hidden_CD = hidden_ND[part].detach().requires_grad_()
                loss = chunk_loss(hidden_CD, part)
            total += loss.detach()
            of_hidden_CD, *of_trained = torch.autograd.grad(loss, (hidden_CD, *trained))
            gradients[0][part] = of_hidden_CD
            for gradient, found in zip(gradients[1:], of_trained, strict=True):
                gradient.add_(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Of the hidden states and the parameters."""
        return (None, None, *(outer[0] * gradient for gradient in ctx.saved_tensors))


def _predicting(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Hidden states at the positions that predict a token, (N, D)."""
    return final_hidden(model, ids_BT)[:, :-1].flatten(0, 1)


def _distillation(
    logits_CV: Tensor, dense_CV: Tensor, targets_C: Tensor, distill_weight: float
) -> Tensor:
    """Sum of the loss over a chunk of positions."""
    log_q_CV = logits_CV.log_softmax(-1)
    loss = functional.kl_div(log_q_CV, dense_CV.log_softmax(-1), reduction="sum", log_target=True)
    if distill_weight < 1:
        next_token = functional.nll_loss(log_q_CV, targets_C, reduction="sum")
        loss = distill_weight * loss + (1 - distill_weight) * next_token
    return loss
