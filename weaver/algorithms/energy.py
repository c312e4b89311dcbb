"""Scores and compensation of dropped neurons, from first and second moments of h."""

from __future__ import annotations

from torch import Tensor


def centred_energy(hidden_variance_F: Tensor, down_FD: Tensor) -> Tensor:
    """Compute FLAP's fluctuation score: the error of replacing each neuron by its mean.

    ``score_j = Var(h_j) * ||Wd_j||^2``, the mean squared output error of replacing ``h_j`` by its
    mean.

    Args:
        hidden_variance_F: variance of the neuron activations, (F,).
        down_FD: down projection, row j of neuron j, (F, D).
    Returns:
        Scores, float32, (F,).
    Source: FLAP, arXiv:2312.11983, metric WIFV (weighted input feature variance).
    """
    return hidden_variance_F.float() * down_FD.float().square().sum(1)


def pooled_moments(mean_GF: Tensor, variance_GF: Tensor, tokens_G: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the tokens of several groups together.

    With shares ``w_g = n_g / sum n``: ``mean = sum_g w_g mean_g``;
    ``variance = sum_g w_g (variance_g + (mean_g - mean)^2)``.

    Args:
        mean_GF: mean of the neuron activations in each group, (G, F).
        variance_GF: their population variance in each group, (G, F).
        tokens_G: tokens of each group, (G,).
    Returns:
        Mean and population variance, float32, (F,) each.
    Raises:
        ValueError: there is no token.
    """
    if int(tokens_G.sum()) == 0:
        raise ValueError("no tokens in these groups")
    share_G1 = (tokens_G.double() / tokens_G.sum())[:, None]
    mean_F = (share_G1 * mean_GF.double()).sum(0)
    spread_GF = variance_GF.double() + (mean_GF.double() - mean_F).square()
    return mean_F.float(), (share_G1 * spread_GF).sum(0).float()


def mean_output(hidden_mean_F: Tensor, down_FD: Tensor, neurons_n: Tensor) -> Tensor:
    """Mean output of some neurons, which replaces them when they are dropped.

    ``bias = sum_{j in neurons} E[h_j] Wd_j``

    Args:
        hidden_mean_F: mean of the neuron activations, (F,).
        down_FD: down projection, (F, D).
        neurons_n: ids of the dropped neurons, (n,).
    Returns:
        The bias, float32, (D,).
    Source: FLAP, arXiv:2312.11983, baseline bias compensation.
    """
    return hidden_mean_F[neurons_n].float() @ down_FD[neurons_n].float()
