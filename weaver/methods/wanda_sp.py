"""Wanda-sp: static pruning by activation norm times weight size."""

from __future__ import annotations

import torch
from torch import Tensor

from weaver.artifacts.types import ExpertLayout
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import static_layout


class WandaSpOptions(MethodOptions):
    """Wanda-sp has no options."""


def partition(
    problem: LayerProblem, options: WandaSpOptions, generator: torch.Generator
) -> ExpertLayout:
    """Keep the neurons with the largest activation norm times mean absolute down weight.

    Args:
        problem: the layer; ``active_neurons`` are kept.
        options: none.
        generator: not used, the method draws nothing.
    Returns:
        A static layout without a bias.
    Source: Wanda-sp, the structured variant of Wanda (arXiv:2306.11695) that FLAP,
        arXiv:2312.11983, compares with. Deviation: FFN only.
    """
    del generator
    return static_layout(problem, shared_scores(problem, options))


def shared_scores(problem: LayerProblem, options: WandaSpOptions) -> Tensor:
    """``score_j = ||h_j||_2 * mean_d |Wd_jd|`` with the norm over all tokens, float32, (F,)."""
    del options
    norm_F = (problem.profile.hidden_second_moment_F * problem.profile.tokens).sqrt()
    return norm_F * problem.weights.down_FD.float().abs().mean(1)
