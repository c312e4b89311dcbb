"""Logits in chunks: the backbone runs once, the vocabulary never meets all tokens at a time.

With V = 262144 (Gemma 3) and T = 2048 the full float32 logits of one window take 2 GiB; a chunk
of 256 tokens takes an eighth of that, and log-softmax needs as much again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.errors import WeaverError

CHUNK = 256
# exp(700) is the last power that float64 holds with room to spare.
MAX_NLL = 700.0


@torch.no_grad()
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


@torch.no_grad()
def project(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Logits of some hidden states in float32, (N, V), as the model's own forward gives them.

    ``z = hidden W_out^T``, and with Gemma 2's soft cap c ``z = c * tanh(z / c)``, computed in the
    model's dtype as there.
    """
    logits_NV: Tensor = model.get_output_embeddings()(hidden_ND)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits_NV = torch.tanh(logits_NV / cap) * cap
    return logits_NV.float()


@torch.no_grad()  # a decorator: a ``with`` around ``yield`` would leak into the consumer
def chunked_logits(
    model: PreTrainedModel, input_ids_T: Tensor, *, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Logits of one window, ``chunk`` tokens at a time.

    Args:
        model: a causal LM.
        input_ids_T: token ids of one window, int64, (T,).
        chunk: tokens per chunk.
    Yields:
        float32 logits in token order, (at most ``chunk``, V).
    Raises:
        ValueError: ``chunk`` is not positive, or the window is not one-dimensional.
    """
    if chunk < 1 or input_ids_T.ndim != 1:
        raise ValueError(f"chunk={chunk}, window of shape {tuple(input_ids_T.shape)}")
    hidden_TD = final_hidden(model, input_ids_T[None])[0]
    for hidden_ND in hidden_TD.split(chunk):
        yield project(model, hidden_ND)


def require_usable(model: PreTrainedModel, nll: float, where: str) -> float:
    """Return a mean negative log-likelihood (nats per token) unless it means nothing.

    Raises:
        WeaverError: it is NaN, infinite, or too large for ``exp``.
    """
    if nll < MAX_NLL:
        return nll
    raise WeaverError(
        f"{model.config.model_type} model: {where} has a loss of {nll} nats per token",
        why=f"logits computed in {model.dtype} are not finite or far from any probability",
        fix="rerun with --set eval.dtype=float32; if the loss stays, rerun assemble",
    )
