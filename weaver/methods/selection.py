"""Choosing experts by predicted contribution: what weave's clusters and its router share."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_hidden
from weaver.algorithms.ridge import ridge_fit
from weaver.artifacts.types import EARLY_TOKENS, LayerProfile, Selection

# The router predicts contributions to this power (of the squared norm). Squared norms have tails
# that a linear fit follows at the expense of all other tokens; docs/LOG.md has the measurements.
CONTRIBUTION_POWER = 0.25

# Relative L2 penalty of the router's regression, see ``ridge_fit``.
ROUTER_PENALTY = 0.1


def sampled_hidden(x_TD: Tensor, weights: GluWeights) -> Tensor:
    """Neuron activations h of FFN inputs that a profile keeps, float32, (T, F).

    Computed in the dtype in which the inputs were kept, which is the one the model runs in: float32
    would cost several times as much where 16-bit products have hardware of their own.
    """
    return glu_hidden(x_TD, weights.to(x_TD.dtype)).float()


def fit_scores(x_TD: Tensor, contribution_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Linear prediction of the experts' contributions from the FFN input.

    ``s = x weight^T + bias ~ ||contribution||^(1/2)``, by ridge regression

    Args:
        x_TD: FFN inputs, (T, D).
        contribution_TE: squared norms (``expert_contributions``), (T, E).
    Returns:
        ``weight_ED`` and ``bias_E``.
    """
    return ridge_fit(x_TD, contribution_TE.pow(CONTRIBUTION_POWER), ROUTER_PENALTY)


def routed_inputs(profile: LayerProfile, selection: Selection) -> LayerProfile:
    """The profile with the FFN inputs whose experts the router chooses.

    With a threshold the first tokens of a sequence run all experts: they are no part of it.
    """
    first_N = profile.first_tokens_N
    if selection != "threshold" or not bool(first_N.any()) or bool(first_N.all()):
        return profile
    return profile.keeping((~first_N).nonzero().flatten())


def mean_experts(profile: LayerProfile, top_k: int, num_experts: int) -> float:
    """Experts that are left to a token of ``routed_inputs`` for K per token on average of all.

    ``(K - f E) / (1 - f)`` with f the share of first tokens, which run all E; at least K / 2.
    """
    others = routed_inputs(profile, "threshold").ffn_inputs_ND.shape[0]
    first = profile.ffn_inputs_ND.shape[0] - others
    left = top_k - (num_experts - top_k) * first / max(others, 1)
    return max(left, top_k / 2)


def threshold_slope(scores_TE: Tensor, top_k: float) -> float:
    """How far a threshold falls when twice as many experts shall run, in score units.

    ``K (q(low) - q(high)) / (high - low)`` with ``q(k)`` the score that k experts per token exceed
    on average (``selection_threshold``), around K: from 0.7 K to 1.3 K, or to half of the way to
    all of them.
    """
    pairs, tokens = scores_TE.numel(), scores_TE.shape[0]
    ends = [0.7 * top_k, min(1.3 * top_k, (top_k + scores_TE.shape[1]) / 2)]
    ordered = scores_TE.flatten().sort(descending=True).values
    low, high = (min(max(round(tokens * end), 1), pairs) for end in ends)
    if high <= low:
        return 0.0
    fall = float(ordered[low - 1] - ordered[high - 1])
    return fall * top_k * tokens / (high - low)


def experts_by_place(profile: LayerProfile, chosen_TE: Tensor) -> tuple[float, float]:
    """Mean number of experts at the early tokens of windows, and at the others.

    Args:
        profile: says where its FFN inputs stand; none of them is a first token.
        chosen_TE: whether each of them uses an expert, (T, E).
    Returns:
        Both means; (0, 0) where places are not known, or one side has no token.
    """
    if profile.input_places_N is None:
        return 0.0, 0.0
    early_T = profile.input_places_N < EARLY_TOKENS
    if not bool(early_T.any()) or bool(early_T.all()):
        return 0.0, 0.0
    counts_T = chosen_TE.float().sum(1)
    return float(counts_T[early_T].mean()), float(counts_T[~early_T].mean())


def selection_threshold(scores_TE: Tensor, top_k: float) -> float:
    """The score that on average K experts per token exceed."""
    skipped = scores_TE.numel() - round(scores_TE.shape[0] * top_k)
    if skipped <= 0:
        return float(scores_TE.min()) - 1.0
    return float(scores_TE.flatten().kthvalue(skipped).values)


def select(scores_TE: Tensor, top_k: int, selection: Selection) -> Tensor:
    """Which experts run for which token, as float 0 or 1, (T, E)."""
    if selection == "threshold":
        return (scores_TE > selection_threshold(scores_TE, top_k)).float()
    chosen_TK = scores_TE.topk(top_k, dim=1).indices
    return torch.zeros_like(scores_TE).scatter_(1, chosen_TK, 1.0)
