"""FLAP: static pruning by output fluctuation, with the mean of what is dropped as a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.algorithms.energy import centred_energy, mean_output
from weaver.artifacts.types import ExpertLayout
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import static_layout, strongest


class FlapOptions(MethodOptions):
    """FLAP has no options."""


def partition(
    problem: LayerProblem, options: FlapOptions, generator: torch.Generator
) -> ExpertLayout:
    """Keep the neurons whose variance matters most, and add the mean output of the others.

    ``score_j = Var(h_j) * ||Wd_j||^2``;  ``bias = sum_{j dropped} E[h_j] Wd_j``

    With the bias the mean output error over the calibration tokens is zero.

    Args:
        problem: the layer; ``active_neurons`` are kept.
        options: none.
        generator: not used, the method draws nothing.
    Returns:
        A static layout with ``output_bias_D``.
    Source: FLAP, arXiv:2312.11983, metric WIFV with bias compensation. Deviation: FFN only, where
        the paper prunes attention heads too.
    """
    del generator
    profile, weights = problem.profile, problem.weights
    scores_F = shared_scores(problem, options)
    _, dropped_n = strongest(scores_F, problem.active_neurons)
    bias_D = mean_output(profile.hidden_mean_F, weights.down_FD, dropped_n)
    return static_layout(problem, scores_F, bias_D)


def shared_scores(problem: LayerProblem, options: FlapOptions) -> Tensor:
    """``score_j = Var(h_j) * ||Wd_j||^2`` (``centred_energy``), (F,)."""
    del options
    return centred_energy(problem.profile.hidden_variance_F, problem.weights.down_FD)
