"""ExpertWeaver: experts of neurons whose gates fire on the same samples."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from weaver.algorithms.balanced import balanced_kmeans
from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.errors import WeaverError
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import expert_layout, routed_top_k, strongest


class ExpertWeaverOptions(MethodOptions):
    """Options of ExpertWeaver, with the paper's defaults.

    Args:
        a_min: shared ratio of a layer whose neurons are all specialised.
        a_max: shared ratio of a layer without specialised neurons.
        tau: coefficient of variation above which a neuron counts as specialised.
        eps: added to the mean in the coefficient of variation.
        shared_ratio: the same shared ratio for all layers (the paper's downcycling); None lets
            every layer find its own.
    """

    a_min: float = Field(0.2, ge=0, le=1)
    a_max: float = Field(0.7, ge=0, le=1)
    tau: float = 0.6
    eps: float = Field(1e-6, gt=0)
    shared_ratio: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.a_min > self.a_max:
            raise ValueError(f"a_min={self.a_min} is above a_max={self.a_max}")
        return self


def partition(
    problem: LayerProblem, options: ExpertWeaverOptions, generator: torch.Generator
) -> ExpertLayout:
    """Share the neurons with the strongest gates and cluster the rest by their sample profiles.

    The profile of neuron j is ``a_j`` in R^M, its mean signed gate activation on each of the M
    samples. Shared are the neurons with the highest mean ``|g|``; the rest go to experts by
    balanced k-means (squared L2) on their profiles.

    Args:
        problem: the layer.
        options: how the shared ratio is found; leftover neurons count as shared.
        generator: source of the k-means seeding.
    Raises:
        WeaverError: fewer than one routed expert would be active, or all of them.
    Source: ExpertWeaver, arXiv:2602.15521. Deviation: see ``shared_expert_count``.
    """
    shared_experts = shared_expert_count(problem, options)
    top_k = routed_top_k(problem, shared_experts)
    shared = problem.leftover_neurons + shared_experts * problem.expert_width
    shared_S, routed_n = strongest(shared_scores(problem, options), shared)
    profiles_nM = problem.profile.sample_gate_mean_MF[:, routed_n].T.contiguous()
    owner_n, _ = balanced_kmeans(profiles_nM, problem.num_experts - shared_experts, generator)
    return expert_layout(problem, shared_S, routed_n, owner_n, top_k)


def shared_scores(problem: LayerProblem, options: ExpertWeaverOptions) -> Tensor:
    """Strength of each neuron's gate, the mean of ``|g_j|`` over all tokens, (F,)."""
    del options
    return problem.profile.gate_abs_mean_F


def shared_expert_count(problem: LayerProblem, options: ExpertWeaverOptions) -> int:
    """S_experts, the slices of a layer that are always active.

    ``alpha = a_max - (a_max - a_min) * r`` with r the share of neurons whose CV is above tau;
    ``S_experts = round((round(alpha * F) - leftover) / N)``, at least 0 and at most one less than
    the active experts.

    Deviation: the paper leaves open what happens when the layer's own ratio takes up the whole
    active budget, as it does at high sparsity. Here one routed expert always stays active.
    """
    ratio = options.shared_ratio
    if ratio is None:
        variation_F = coefficient_of_variation(problem.profile, options.eps)
        specialised = float((variation_F > options.tau).double().mean())
        ratio = options.a_max - (options.a_max - options.a_min) * specialised
    neurons = round(ratio * problem.weights.intermediate_size) - problem.leftover_neurons
    wanted = round(neurons / problem.expert_width)
    return max(0, min(wanted, problem.active_experts - 1))


def coefficient_of_variation(profile: LayerProfile, eps: float) -> Tensor:
    """How unevenly a neuron's gate fires over the tasks, ``CV_j = std(a_j) / (mean(a_j) + eps)``.

    The samples of each group (task) are averaged first; mean and population standard deviation run
    over the groups. With one group only they run over the samples. The mean is signed, as in the
    paper: a neuron whose gate is negative on average has a negative CV and is never specialised.

    Returns:
        CV, float32, (F,).
    Raises:
        WeaverError: the profile has a single sample, over which nothing varies.
    Source: ExpertWeaver, arXiv:2602.15521, layer-adaptive allocation.
    """
    tasks_GF = _group_means(profile)
    if tasks_GF.shape[0] == 1:
        tasks_GF = profile.sample_gate_mean_MF
    if tasks_GF.shape[0] == 1:
        raise WeaverError(
            "the profile holds 1 calibration sample",
            why="expertweaver finds its shared ratio from how gates vary between tasks or samples",
            fix="calibrate on more text, or set --set partition.options.shared_ratio=0.4",
        )
    return tasks_GF.std(0, correction=0) / (tasks_GF.mean(0) + eps)


def _group_means(profile: LayerProfile) -> Tensor:
    """Mean sample profile of every group, (G, F)."""
    groups, index_M = profile.sample_groups_M.unique(return_inverse=True)
    member_GM = (index_M == torch.arange(groups.numel(), device=groups.device)[:, None]).float()
    weight_GM: Tensor = member_GM / member_GM.sum(1, keepdim=True)
    return torch.mm(weight_GM, profile.sample_gate_mean_MF.float())
