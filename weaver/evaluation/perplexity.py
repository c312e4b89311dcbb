"""Perplexity, and how far a converted model is from the dense one, in one pass over the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from weaver.errors import WeaverError
from weaver.evaluation.logits import chunked_logits, require_usable
from weaver.models.output_head import chunk_tokens

OnWindow = Callable[[int], None]


@dataclass(frozen=True)
class WindowLosses:
    """Losses of one model.

    Args:
        nll: per window the mean negative log-likelihood in nats per token.
        tokens: predicted tokens in all windows, W * (T - 1).
    """

    nll: tuple[float, ...]
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean NLL over all predicted tokens (windows have equal length)."""
        return math.exp(_mean(self.nll))


@dataclass(frozen=True)
class Comparison:
    """A converted model against the dense one on the same windows.

    Args:
        dense: losses of the dense model.
        moe: losses of the converted model.
        kl_WT: KL(dense || converted) at every position that predicts a token, nats, (W, T - 1).
        top1_per_window: share of positions per window where both put the same token first.
    """

    dense: WindowLosses
    moe: WindowLosses
    kl_WT: Tensor
    top1_per_window: tuple[float, ...]

    @property
    def tokens(self) -> int:
        return self.dense.tokens

    @property
    def kl(self) -> float:
        """Mean KL(dense || converted) in nats per token."""
        return _mean(self.kl_per_window)

    @property
    def kl_per_window(self) -> tuple[float, ...]:
        """Mean KL per window, nats per token."""
        return tuple(self.kl_WT.double().mean(1).tolist())

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both models put the same token first."""
        return _mean(self.top1_per_window)


def perplexity(
    model: PreTrainedModel,
    windows_WT: Tensor,
    *,
    chunk: int | None = None,
    on_window: OnWindow | None = None,
) -> WindowLosses:
    """Losses of one model on windows of text.

    ``NLL_w = -1/(T-1) * sum_{t=1}^{T-1} ln p(x_t | x_<t)``; each window starts afresh.

    Args:
        model: a causal LM.
        windows_WT: token ids, int64, (W, T).
        chunk: tokens per block of logits; what suits the model's device if left out.
        on_window: called with the number of windows done.
    Returns:
        Per-window losses; ``.perplexity`` is ``exp`` of their mean.
    Raises:
        ValueError: the windows are not (W >= 1, T >= 2).
        WeaverError: the loss is not a usable number.
    """
    _check_windows(windows_WT)
    nll = []
    for window, ids_T in enumerate(windows_WT):
        total = sum(
            _nll_sum(log_p_NV, targets_N)
            for log_p_NV, targets_N in _log_probabilities(model, ids_T, chunk)
        )
        nll.append(require_usable(model, total / (ids_T.numel() - 1), f"window {window}"))
        if on_window is not None:
            on_window(window + 1)
    return WindowLosses(tuple(nll), _predicted(windows_WT))


def compare(
    dense: PreTrainedModel,
    converted: PreTrainedModel,
    windows_WT: Tensor,
    *,
    chunk: int | None = None,
    on_window: OnWindow | None = None,
) -> Comparison:
    """Losses of both models and the distance between their predictions, in one pass.

    ``KL = mean_t sum_v p_dense(v) * (ln p_dense(v) - ln p_moe(v))`` over the T - 1 positions of a
    window that predict a token, log-softmax in float32; top-1 agreement over the same positions.

    Args:
        dense: the dense model.
        converted: the converted model, with the same vocabulary.
        windows_WT: token ids, int64, (W, T).
        chunk: tokens per block of logits, of which one per model exists at a time; what suits the
            converted model's device if left out.
        on_window: called with the number of windows done.
    Raises:
        ValueError: the windows are not (W >= 1, T >= 2).
        WeaverError: the vocabularies differ, or a loss is not a usable number.
    """
    _check_windows(windows_WT)
    _check_vocabularies(dense, converted)
    chunk = chunk_tokens(converted) if chunk is None else chunk
    rows: list[tuple[float, float, float]] = []
    kl_rows: list[Tensor] = []
    for window, ids_T in enumerate(windows_WT):
        sums, kl = torch.zeros(3, dtype=torch.float64, device="cpu"), []
        for (dense_NV, targets_N), (moe_NV, _) in zip(
            _log_probabilities(dense, ids_T, chunk),
            _log_probabilities(converted, ids_T, chunk),
            strict=True,
        ):
            *found, kl_N = chunk_losses(dense_NV, moe_NV, targets_N)
            sums += torch.tensor(found, dtype=torch.float64, device="cpu")
            kl.append(kl_N.cpu())
        dense_nll, moe_nll, top1 = (sums / (ids_T.numel() - 1)).tolist()
        require_usable(dense, dense_nll, f"window {window}")
        require_usable(converted, moe_nll, f"window {window}")
        rows.append((dense_nll, moe_nll, top1))
        kl_rows.append(torch.cat(kl))
        if on_window is not None:
            on_window(window + 1)
    dense_W, moe_W, top1_W = (tuple(column) for column in zip(*rows, strict=True))
    tokens, kl_WT = _predicted(windows_WT), torch.stack(kl_rows)
    return Comparison(WindowLosses(dense_W, tokens), WindowLosses(moe_W, tokens), kl_WT, top1_W)


def token_kl(dense_NV: Tensor, moe_NV: Tensor) -> Tensor:
    """KL(dense || converted) at every position, in nats.

    ``sum_v p_dense(v) * (ln p_dense(v) - ln p_moe(v))``

    Args:
        dense_NV: log-probabilities of the dense model, float32, (N, V).
        moe_NV: those of the converted model, (N, V).

    Returns:
        float32, (N,).
    """
    return (dense_NV.exp() * (dense_NV - moe_NV)).sum(-1)


def chunk_losses(
    dense_NV: Tensor, moe_NV: Tensor, targets_N: Tensor
) -> tuple[float, float, float, Tensor]:
    """Of a chunk of log-probabilities: sums of dense NLL, converted NLL, top-1 hits; KL, (N,)."""
    moe_NV = moe_NV.to(dense_NV.device)
    kl_N = token_kl(dense_NV, moe_NV)
    agree_N = dense_NV.argmax(-1) == moe_NV.argmax(-1)
    return (
        _nll_sum(dense_NV, targets_N),
        _nll_sum(moe_NV, targets_N),
        float(agree_N.sum().item()),
        kl_N,
    )


def _log_probabilities(
    model: PreTrainedModel, ids_T: Tensor, chunk: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities in chunks with the token each position predicts; the last predicts none."""
    start = 0
    for logits_NV in chunked_logits(model, ids_T, chunk=chunk):
        targets_N = ids_T[start + 1 : start + 1 + logits_NV.shape[0]].to(logits_NV.device)
        start += logits_NV.shape[0]
        if targets_N.numel():
            yield functional.log_softmax(logits_NV[: targets_N.numel()], dim=-1), targets_N


def _nll_sum(log_p_NV: Tensor, targets_N: Tensor) -> float:
    return -log_p_NV.gather(-1, targets_N[:, None]).double().sum().item()


def _check_windows(windows_WT: Tensor) -> None:
    if windows_WT.ndim != 2 or windows_WT.shape[0] < 1 or windows_WT.shape[1] < 2:
        raise ValueError(f"windows of shape {tuple(windows_WT.shape)}, not (W >= 1, T >= 2)")


def _check_vocabularies(dense: PreTrainedModel, converted: PreTrainedModel) -> None:
    sizes = dense.config.vocab_size, converted.config.vocab_size
    if sizes[0] != sizes[1]:
        raise WeaverError(
            f"vocabularies differ: dense {sizes[0]}, converted {sizes[1]} tokens",
            why="KL and agreement compare the models token by token",
            fix="evaluate against the dense model that the converted one was made from",
        )


def _predicted(windows_WT: Tensor) -> int:
    return windows_WT.shape[0] * (windows_WT.shape[1] - 1)


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
