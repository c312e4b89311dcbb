"""DIVE: experts are prunings of the whole FFN, each for a cluster of domains."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from weaver.algorithms.energy import centred_energy, mean_output, pooled_moments
from weaver.artifacts.types import ExpertLayout
from weaver.methods.base import GroupOptions, LayerProblem
from weaver.methods.layouts import strongest


class DiveOptions(GroupOptions):
    """Options of DIVE: one expert per token, or two of half the width."""

    top_k: int = Field(1, ge=1, le=2)


def partition(
    problem: LayerProblem, options: DiveOptions, generator: torch.Generator
) -> ExpertLayout:
    """Prune the FFN once per cluster of groups, as FLAP would on the text of that cluster alone.

    With mean and variance over the tokens of the groups of expert e (``pooled_moments``):
    ``score_ej = Var_e(h_j) * ||Wd_j||^2``; the N highest stay;
    ``b_e = sum_{j dropped} E_e[h_j] Wd_j``. Of a token's K experts the weighted mean is the output.

    Experts have neurons in common, and some neurons vanish.

    Args:
        problem: the layer; ``group_experts_G`` names the expert of each calibration group.
        options: K.
        generator: not used, the method draws nothing.
    Returns:
        A layout whose experts overlap, with softmax weights and a constant per expert.
    Raises:
        ValueError: the profile does not keep groups apart, no expert was given to each group, or an
            expert has no group with a token.
    Source: DIVE, arXiv:2506.09351, section 3.2: metric WIFV, uniform per layer, bias kept.
    """
    del generator
    profile, experts_G = problem.profile, problem.group_experts_G
    tokens_G, mean_GF = profile.group_tokens_G, profile.group_hidden_mean_GF
    variance_GF = profile.group_hidden_variance_GF
    if tokens_G is None or mean_GF is None or variance_GF is None or experts_G is None:
        raise ValueError("needs statistics by group, and the expert of each group")
    down_FD = problem.weights.down_FD
    kept: list[Tensor] = []
    biases: list[Tensor] = []
    for expert in range(problem.num_experts):
        own_G = experts_G == expert
        mean_F, variance_F = pooled_moments(mean_GF[own_G], variance_GF[own_G], tokens_G[own_G])
        scores_F = centred_energy(variance_F, down_FD)
        kept_N, dropped_n = strongest(scores_F, problem.expert_width)
        kept.append(kept_N)
        biases.append(mean_output(mean_F, down_FD, dropped_n))
    return ExpertLayout(
        intermediate_size=problem.weights.intermediate_size,
        top_k=options.top_k,
        shared_S=torch.empty(0, dtype=torch.int64, device=problem.weights.device),
        experts_EN=torch.stack(kept),
        weighting="softmax",
        overlap=True,
        expert_bias_ED=torch.stack(biases),
    )
