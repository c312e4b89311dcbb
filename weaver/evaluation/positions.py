"""Errors by position: what happens at the first tokens of a sequence is seen beside the rest."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.artifacts.results import PositionKl
from weaver.artifacts.types import FIRST_TOKENS, LayerProfile
from weaver.models.moe import MoEFeedForward
from weaver.models.pacing import Pacer

# First and last position, counted from 1. Everything attends to the first token, which often is a
# BOS; the second sees little else; behind 128 a text has its context.
POSITION_RANGES: tuple[tuple[int, int | None], ...] = (
    *((1, 1), (2, 2), (3, 16), (17, 128)),
    (129, None),
)

# FFN inputs behind a range's error, per layer.
_MOST_INPUTS = 256


def kl_by_position(kl_WT: Tensor) -> tuple[PositionKl, ...]:
    """Mean KL of every range that the windows reach.

    Args:
        kl_WT: KL(dense || converted) at each position that predicts a token, nats, (W, T).
    """
    means = []
    for first, last in POSITION_RANGES:
        part_Wt = kl_WT[:, first - 1 : last]
        if part_Wt.numel():
            kl = part_Wt.double().mean().item()
            means.append(PositionKl(first=first, last=last, kl=kl, tokens=part_Wt.numel()))
    return tuple(means)


@torch.no_grad()
def error_by_position(
    profile: LayerProfile, weights: GluWeights, ffn: MoEFeedForward
) -> Iterator[tuple[int, int | None, float]]:
    """Relative error of a converted FFN at calibration inputs, by their places in the windows.

    ``sum_t w_t ||y'_t - y_t||^2 / sum_t w_t ||y_t||^2`` with the weights of
    ``LayerProfile.error_weights_N``, over at most 256 inputs of each range.

    Args:
        profile: holds inputs, places and weights.
        weights: the dense FFN, float32.
        ffn: the converted FFN, float32.
    Yields:
        First and last position of a range, counted from 1, and its error; nothing for inputs
        whose places are not known.
    """
    places_N = profile.input_places_N
    if places_N is None:
        return
    for first, last in POSITION_RANGES:
        here_N = places_N >= first - 1
        if last is not None:
            here_N &= places_N < last
        rows_n = here_N.nonzero().flatten()[:_MOST_INPUTS]
        if rows_n.numel():
            yield first, last, _relative_error(profile.keeping(rows_n), weights, ffn)


def _relative_error(profile: LayerProfile, weights: GluWeights, ffn: MoEFeedForward) -> float:
    assert profile.input_places_N is not None
    pacer = Pacer((), FIRST_TOKENS)
    pacer.free(profile.input_places_N[None])
    ffn.pace = (pacer, 0)
    x_TD = profile.ffn_inputs_ND.float()
    dense_TD = glu_forward(x_TD, weights)
    weight_T = profile.error_weights_N.double()
    error = weight_T @ (ffn(x_TD) - dense_TD).double().square().sum(1)
    size = weight_T @ dense_TD.double().square().sum(1)
    return float(error / size.clamp_min(torch.finfo(torch.float64).tiny))
