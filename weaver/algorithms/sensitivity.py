"""How much an error in an FFN's output costs at the model's output, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.algorithms.ridge import ridge_fit

# Relative L2 penalty of the regression, see ``ridge_fit``: sampled gradients are noisy, and with
# 2,048 tokens this one predicts other text nearly as well as 16,384 tokens do; docs/LOG.md.
_PENALTY = 1.0

# Limit of a predicted logarithm, for inputs unlike those of the regression.
_LIMIT = 4.0

# Below this squared norm a gradient is taken for this one.
_LEAST = 1e-12

# Places of a window that share a mean.
_PLACES = 16


def fit_sensitivity(
    x_TD: Tensor, gradient_TD: Tensor, places_T: Tensor, known_T: Tensor | None = None
) -> tuple[Tensor, float]:
    """Ridge regression of ``log ||g_t||^2`` on the FFN input, less its mean.

    ``log s_t ~ x_t . direction + offset``, 0 on average.

    ``E[g g^T]`` is the Fisher information of the FFN output, so that an error e costs about
    ``1/2 E[(g . e)^2]`` nats: in proportion to ``||g||^2`` where the direction of e is not known.
    A single sampled gradient says little about its token; the regression averages over tokens with
    similar inputs, and applies to inputs that no gradient was computed for. Places of a window keep
    their mean to themselves: an error late in a window has few tokens behind it, which says nothing
    about the token.

    Args:
        x_TD: FFN inputs, (T, D).
        gradient_TD: ``fisher_gradients`` at the same tokens, (T, D).
        places_T: place of each token in its window, int64, (T,).
        known_T: factors of the sensitivity that are applied elsewhere, positive, (T,).
    Returns:
        ``direction_D`` and ``offset`` of what ``known_T`` leaves over.
    Raises:
        ValueError: no rows, or the row counts differ.
    Source: weaver's own; Fisher information as a measure of layer errors is Optimal Brain
        Surgeon's, in the form of arXiv:2203.07259.
    """
    logs_T = gradient_TD.float().square().sum(1).clamp_min(_LEAST).log()
    if known_T is not None:
        logs_T = logs_T - known_T.log()
    block_T = places_T // _PLACES
    count_B = torch.bincount(block_T).clamp_min(1)
    mean_B = logs_T.new_zeros(count_B.numel()).index_add(0, block_T, logs_T) / count_B
    logs_T = logs_T - mean_B[block_T]
    weight_1D, bias_1 = ridge_fit(x_TD, logs_T[:, None], _PENALTY)
    return weight_1D[0], float(bias_1 - logs_T.mean())


def predicted_sensitivity(x_TD: Tensor, direction_D: Tensor, offset: float) -> Tensor:
    """``s_t`` of FFN inputs, 1 in the geometric mean, (T,); see ``fit_sensitivity``.

    Args:
        x_TD: FFN inputs, (T, D).
        direction_D, offset: of the prediction.
    """
    logs_T = x_TD.float() @ direction_D + offset
    return logs_T.clamp(-_LIMIT, _LIMIT).exp()


def predicted_kl(error_TD: Tensor, gradient_TD: Tensor) -> float:
    """KL divergence that an error in one FFN's output is predicted to cause, nats per token.

    ``KL ~ 1/2 mean_t (g_t . e_t)^2``: second order in the error, errors of different tokens taken
    as independent.

    Args:
        error_TD: converted output less dense output, (T, D).
        gradient_TD: ``fisher_gradients`` at the same tokens, (T, D).
    """
    projected_T = (error_TD.float() * gradient_TD.float()).sum(1)
    return 0.5 * float(projected_T.square().mean())
