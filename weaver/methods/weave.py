"""weave: clusters of neurons that matter together and that a linear router can separate."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from weaver.algorithms.balanced import balanced_assignment, balanced_kmeans
from weaver.algorithms.contributions import expert_contributions
from weaver.algorithms.energy import centred_energy
from weaver.artifacts.types import ExpertLayout, LayerProfile, Selection
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import expert_layout, routed_top_k, strongest
from weaver.methods.selection import fit_scores, routed_inputs, sampled_hidden, select

# FFN inputs on which neurons move between experts: at least so many, and so many per dimension that
# the router's regression is well posed; the final router and the refit use all of them.
_CLUSTER_INPUTS = 8192
_INPUTS_PER_DIMENSION = 4

# Rounds of the seeding k-means: the alternation that follows moves neurons anyway.
_CLUSTER_ROUNDS = 10


class WeaveOptions(MethodOptions):
    """Options of weave.

    Args:
        shared_share: share of the active slices that is always active, rounded; at least one active
            slice is routed.
        selection: ``threshold`` runs every expert whose predicted contribution exceeds one
            threshold per layer, K of them on average; ``top-k`` runs exactly K, the form that
            stock architectures hold.
        alternations: rounds in which the router is fitted to the experts and the neurons move to
            the experts that run when they matter; 0 leaves the co-activation clusters.
        cluster_tokens: tokens whose co-activation seeds the experts.
    """

    shared_share: float = Field(0.25, ge=0, lt=1)
    selection: Selection = "threshold"
    alternations: int = Field(3, ge=0)
    cluster_tokens: int = Field(1024, gt=0)

    @property
    def selects(self) -> Selection:
        return self.selection


def partition(
    problem: LayerProblem, options: WeaveOptions, generator: torch.Generator
) -> ExpertLayout:
    """Share by centred energy, cluster by co-activation, then move neurons where the router sees.

    A neuron's contribution to a token is ``v_tj = (h_tj - E[h_j])^2 ||Wd_j||^2``: what is lost when
    it is skipped and its mean is supplied. Shared are the neurons with the largest mean
    contribution, which makes a layer without routed experts FLAP's. The others are clustered by
    balanced k-means on their centred, normalised ``v_tj^(1/2)`` over a sample of tokens. Then, a
    few times: fit the linear scores of the experts, select experts for every token as the router
    will, and assign the neurons to experts by ``max sum_j sum_t m_t,owner(j) v_tj`` under equal
    sizes, the contribution that the selection captures.

    Args:
        problem: the layer; its profile's ``ffn_inputs_ND`` are the tokens that are used.
        options: see ``WeaveOptions``.
        generator: seeds the clustering.
    Raises:
        WeaverError: no routed expert would be active, or all of them.
    Source: weaver's own; centred energy is FLAP's metric (arXiv:2312.11983).
    """
    # 1. Shared: the slices with the largest mean contribution; the rest is routed.
    shared_experts = min(
        round(problem.active_experts * options.shared_share), problem.active_experts - 1
    )
    top_k = routed_top_k(problem, shared_experts)
    shared = problem.leftover_neurons + shared_experts * problem.expert_width
    shared_S, routed_n = strongest(shared_scores(problem, options), shared)
    # 2. Contributions v of the routed neurons, on tokens whose experts the router chooses.
    profile = _thinned(routed_inputs(problem.profile, options.selection))
    x_TD = profile.ffn_inputs_ND.float()
    routed = problem.weights.select(routed_n)
    hidden_Tn = sampled_hidden(profile.ffn_inputs_ND, routed) - profile.hidden_mean_F[routed_n]
    # They count more where errors cost more.
    hidden_Tn *= profile.selection_weights_N.sqrt()[:, None]
    contribution_Tn = hidden_Tn.square() * routed.down_FD.square().sum(1)
    # 3. Start from clusters of neurons that contribute to the same tokens.
    owner_n = _coactivation_clusters(problem, contribution_Tn, options, generator)
    for _ in range(options.alternations):
        # 4. Fit the router to the experts, and let it choose for every token.
        experts_EN = owner_n.argsort(stable=True).view(-1, problem.expert_width)
        contribution_TE = expert_contributions(hidden_Tn, routed.down_FD, experts_EN)
        weight_ED, bias_E = fit_scores(x_TD, contribution_TE)
        chosen_TE = select(x_TD @ weight_ED.T + bias_E, top_k, options.selection)
        # 5. Give each neuron to the expert that runs when the neuron contributes, sizes equal.
        captured_nE = contribution_Tn.T @ chosen_TE
        # Where no neuron contributes anything, one expert is as good as another.
        mean = captured_nE.mean().clamp_min(torch.finfo(captured_nE.dtype).tiny)
        owner_n = balanced_assignment(-captured_nE / mean, problem.expert_width)
    layout = expert_layout(problem, shared_S, routed_n, owner_n, top_k)
    return replace(layout, selection=options.selection)


def shared_scores(problem: LayerProblem, options: WeaveOptions) -> Tensor:
    """``score_j = Var(h_j) * ||Wd_j||^2`` (``centred_energy``), (F,)."""
    del options
    return centred_energy(problem.profile.hidden_variance_F, problem.weights.down_FD)


def _thinned(profile: LayerProfile) -> LayerProfile:
    """As many FFN inputs as the clusters need, evenly spread."""
    rows, hidden_size = profile.ffn_inputs_ND.shape
    stride = max(1, rows // max(_CLUSTER_INPUTS, _INPUTS_PER_DIMENSION * hidden_size))
    return (
        profile
        if stride == 1
        else profile.keeping(torch.arange(0, rows, stride, device=profile.ffn_inputs_ND.device))
    )


def _coactivation_clusters(
    problem: LayerProblem,
    contribution_Tn: Tensor,
    options: WeaveOptions,
    generator: torch.Generator,
) -> Tensor:
    stride = max(1, contribution_Tn.shape[0] // options.cluster_tokens)
    points_nT = contribution_Tn[::stride].sqrt().T
    points_nT = points_nT - points_nT.mean(1, keepdim=True)
    points_nT = torch.nn.functional.normalize(points_nT, dim=1)
    clusters = contribution_Tn.shape[1] // problem.expert_width
    return balanced_kmeans(points_nT, clusters, generator, max_iterations=_CLUSTER_ROUNDS)[0]
