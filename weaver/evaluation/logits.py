"""Logits in chunks: the backbone runs once, the vocabulary never meets all tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.errors import WeaverError
from weaver.models import output_head

# exp(700) is the last power that float64 holds with room to spare.
MAX_NLL = 700.0

# Nothing that is measured needs a graph.
final_hidden = torch.no_grad()(output_head.final_hidden)
project = torch.no_grad()(output_head.project)


@torch.no_grad()  # a decorator: a ``with`` around ``yield`` would leak into the consumer
def chunked_logits(
    model: PreTrainedModel, input_ids_T: Tensor, *, chunk: int | None = None
) -> Iterator[Tensor]:
    """Logits of one window, ``chunk`` tokens at a time.

    Args:
        model: a causal LM.
        input_ids_T: token ids of one window, int64, (T,).
        chunk: tokens per chunk; what suits the model's device if left out.
    Yields:
        float32 logits in token order, (at most ``chunk``, V).
    Raises:
        ValueError: ``chunk`` is not positive, or the window is not one-dimensional.
    """
    chunk = output_head.chunk_tokens(model) if chunk is None else chunk
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
