"""How much a split depends on the calibration text it was made from."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from weaver.artifacts.types import ExpertLayout


def jaccard(first_n: Tensor, second_n: Tensor) -> float:
    """Overlap of two sets of neuron ids, ``|A and B| / |A or B|``; 1 for two empty sets.

    Args:
        first_n: ids without repetition, int, (n,).
        second_n: the same of the other set.
    """
    common = int(torch.isin(first_n, second_n).sum())
    union = first_n.numel() + second_n.numel() - common
    return common / union if union else 1.0


def shared_jaccard(first: ExpertLayout, second: ExpertLayout) -> float | None:
    """Jaccard index of the shared (static: the kept) neurons; None where neither layout has any."""
    if first.num_shared_neurons == second.num_shared_neurons == 0:
        return None
    return jaccard(first.shared_S, second.shared_S)


def expert_jaccard(first: ExpertLayout, second: ExpertLayout) -> float | None:
    """Mean Jaccard index of the routed experts of two layouts, each with its best partner.

    ``1 / max(E1, E2) * max_p sum_i J(A_i, B_p(i))`` over all matchings p of the experts
    (maximum-weight bipartite matching): how experts are numbered does not count. Where the layouts
    differ in E, an expert that is left without a partner counts 0.

    Args:
        first: layout of one layer.
        second: another layout of the same layer.
    Returns:
        The mean in [0, 1]; None where neither layout has routed experts.
    Raises:
        ValueError: the layouts are of FFNs of different sizes.
    """
    if first.intermediate_size != second.intermediate_size:
        raise ValueError(
            f"layouts of {first.intermediate_size} and {second.intermediate_size} neurons"
        )
    experts = max(first.num_routed_experts, second.num_routed_experts)
    if experts == 0:
        return None
    jaccard_EE = _pairwise_jaccard(first, second)
    rows, columns = linear_sum_assignment(jaccard_EE.numpy(), maximize=True)
    return float(jaccard_EE[rows, columns].sum()) / experts


def score_correlation(first_F: Tensor, second_F: Tensor) -> float | None:
    """Spearman correlation of two scores of the neurons: that of their ranks, ties averaged.

    Args:
        first_F: scores of the neurons, (F,).
        second_F: other scores of the same neurons, (F,).
    Returns:
        The correlation in [-1, 1]; None where all scores of one side are equal, since ranks that do
        not vary correlate with nothing.
    """
    for scores_F in (first_F, second_F):
        if bool((scores_F == scores_F[0]).all()):
            return None
    return float(spearmanr(first_F.numpy(), second_F.numpy()).statistic)


def sample_halves(sample_ids_N: Tensor, sample_groups_M: Tensor) -> tuple[Tensor, Tensor]:
    """Divide tokens into two halves that have no calibration sample in common.

    The samples, ordered by group and then by id, go to the halves in turn, so that both see every
    group of two or more samples. The halves are as equal in tokens as the samples are.

    Args:
        sample_ids_N: calibration sample of each token, int, (N,).
        sample_groups_M: group of each sample, int, (M,).
    Returns:
        Token positions of the first and of the second half, ascending.
    """
    present_m = sample_ids_N.unique()
    order_m = torch.argsort(sample_groups_M[present_m], stable=True)
    second_N = torch.isin(sample_ids_N, present_m[order_m[1::2]])
    return (~second_N).nonzero().flatten(), second_N.nonzero().flatten()


def _pairwise_jaccard(first: ExpertLayout, second: ExpertLayout) -> Tensor:
    """Jaccard index of every expert with every other one, float64, (E1, E2)."""
    common_EE = _members(first) @ _members(second).T
    sizes_EE = torch.full_like(common_EE, first.expert_width + second.expert_width)
    return common_EE / (sizes_EE - common_EE)


def _members(layout: ExpertLayout) -> Tensor:
    """1 where an expert holds a neuron, float64, (E, F)."""
    one_hot_ENF = functional.one_hot(layout.experts_EN, layout.intermediate_size)
    return one_hot_ENF.sum(1).double()
