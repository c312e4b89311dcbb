"""Routers that need no training: built from the weights and the layout of one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weaver.algorithms.contributions import expert_contributions, expert_errors
from weaver.algorithms.glu import GluWeights
from weaver.algorithms.markers import l1_distances, marker_columns, mean_columns
from weaver.algorithms.ridge import ridge_fit
from weaver.algorithms.statistics import normalised
from weaver.artifacts.types import ExpertLayout, LayerProfile, Router, RouterKind, Selection
from weaver.methods.base import RouterFunction
from weaver.methods.selection import (
    ROUTER_PENALTY,
    experts_by_place,
    fit_scores,
    mean_experts,
    routed_inputs,
    sampled_hidden,
    selection_threshold,
    threshold_slope,
)

# Tokens whose neuron activations exist at once.
_CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class RouterSpec:
    """One row of the router table.

    Args:
        name: what ``--router`` takes.
        kind: the form of the router, see ``weaver.artifacts.types.Router``.
        summary: one line for help and README.
        source: arXiv id or where the router comes from.
        build: the pure function.
        selections: the ways of selecting experts that its scores serve.
    """

    name: str
    kind: RouterKind
    summary: str
    source: str
    build: RouterFunction
    selections: tuple[Selection, ...] = ("top-k",)


def mean_gate_router(
    weights: GluWeights, profile: LayerProfile, layout: ExpertLayout, generator: torch.Generator
) -> Router:
    """Route by the mean gate vector of each expert.

    ``s_e = x . (1/N) sum_{j in expert e} Wg_j``

    Args:
        weights: the dense FFN.
        profile: not used.
        layout: which neurons each expert holds.
        generator: not used.
    Returns:
        A linear router.
    Raises:
        ValueError: the layout has no routed experts.
    Source: ExpertWeaver, arXiv:2602.15521. Deviation: biases of the gate projection are left out,
        the router having no intercept.
    """
    del profile, generator
    _require_experts(layout)
    return _untrained(layout, "linear", weights.gate_FD[layout.experts_EN].float().mean(1))


def representative_router(
    weights: GluWeights, profile: LayerProfile, layout: ExpertLayout, generator: torch.Generator
) -> Router:
    """Route by the activation of one representative neuron per expert.

    ``s_e = |(x . wu^_R) * act(x . wg^_R)|``, R the member whose marker column is nearest (L1) to
    the mean column of its expert; ``v^ = v / ||v||_2``. Equal distances go to the lower neuron id.

    Args:
        weights: the dense FFN.
        profile: holds the markers.
        layout: which neurons each expert holds.
        generator: not used.
    Returns:
        A GLU router.
    Raises:
        ValueError: the layout has no routed experts.
    Source: CMoE, arXiv:2502.04416, section 4.2. Deviation: biases of gate and up are left out.
    """
    del generator
    representatives_E = representative_neurons(profile, layout)
    unit = normalised(weights.select(representatives_E))
    return _untrained(layout, "glu", unit.gate_FD, unit.up_FD)


def random_router(
    weights: GluWeights, profile: LayerProfile, layout: ExpertLayout, generator: torch.Generator
) -> Router:
    """Route at random: the baseline for any router.

    ``weight_ED ~ N(0, 1/D)``, that is with standard deviation ``1 / sqrt(D)``.

    Args:
        weights: the dense FFN, for its hidden size.
        profile: not used.
        layout: for its number of experts.
        generator: source of the weights.
    Returns:
        A linear router.
    Raises:
        ValueError: the layout has no routed experts.
    """
    del profile
    _require_experts(layout)
    shape = (layout.num_routed_experts, weights.hidden_size)
    weight_ED = (
        torch.randn(shape, generator=generator, device=generator.device) * weights.hidden_size**-0.5
    )
    return _untrained(layout, "linear", weight_ED.to(weights.device))


def ridge_router(
    weights: GluWeights, profile: LayerProfile, layout: ExpertLayout, generator: torch.Generator
) -> Router:
    """Route by each expert's predicted contribution to the output.

    ``s_e ~ ||(h_e - E[h_e]) Wd_e||^(1/2)``, linear in x with an intercept (``fit_scores``). For a
    layout with ``threshold`` selection the intercept is lowered, so that exactly the positive
    scores are selected: K per token on average over a calibration window, in which first tokens run
    all experts and are no part of the regression. A contribution counts more where errors cost more
    (``LayerProfile.selection_weights_N``).

    Args:
        weights: the dense FFN.
        profile: its ``ffn_inputs_ND`` are the tokens of the regression.
        layout: which neurons each expert holds, and how experts are selected.
        generator: not used.
    Returns:
        A linear router with an intercept.
    Raises:
        ValueError: the layout has no routed experts.
    Source: weaver's own.
    """
    del generator
    _require_experts(layout)
    top_k = mean_experts(profile, layout.top_k, layout.num_routed_experts)
    profile = routed_inputs(profile, layout.selection)
    contributions = []
    for inputs_TD in profile.ffn_inputs_ND.split(_CHUNK_TOKENS):
        hidden_TF = sampled_hidden(inputs_TD, weights) - profile.hidden_mean_F
        contributions.append(expert_contributions(hidden_TF, weights.down_FD, layout.experts_EN))
    x_TD = profile.ffn_inputs_ND.float()
    contribution_TE = torch.cat(contributions) * profile.selection_weights_N[:, None]
    weight_ED, bias_E = fit_scores(x_TD, contribution_TE)
    if layout.selection == "top-k":
        return _untrained(layout, "linear", weight_ED, bias_E=bias_E)
    scores_TE = x_TD @ weight_ED.T + bias_E
    threshold = selection_threshold(scores_TE, top_k)
    early, late = experts_by_place(profile, scores_TE > threshold)
    return replace(
        _untrained(layout, "linear", weight_ED, bias_E=bias_E - threshold),
        threshold_slope=threshold_slope(scores_TE, top_k),
        early_experts=early,
        late_experts=late,
    )


def error_ridge_router(
    weights: GluWeights, profile: LayerProfile, layout: ExpertLayout, generator: torch.Generator
) -> Router:
    """Route to the experts that are predicted to come nearest to the dense FFN.

    ``s_e ~ -||y - (h_shared Wd_shared + h_e Wd_e + b_e)||^2 / mean``, linear in x with an intercept
    (``ridge_fit``): the squared error of expert e alone, over its mean over tokens and experts, so
    that logits do not depend on the size of a layer's outputs.

    Args:
        weights: the dense FFN.
        profile: its ``ffn_inputs_ND`` are the tokens of the regression.
        layout: which neurons each expert holds, and the constants b_e of experts that have one.
        generator: not used.
    Returns:
        A linear router with an intercept.
    Raises:
        ValueError: the layout has no routed experts.
    Source: weaver's own; DIVE (arXiv:2506.09351) trains its router from scratch.
    """
    del generator
    _require_experts(layout)
    errors = []
    for inputs_TD in profile.ffn_inputs_ND.split(_CHUNK_TOKENS):
        hidden_TF, down_FD = sampled_hidden(inputs_TD, weights), weights.down_FD.float()
        dense_TD = hidden_TF @ down_FD
        target_TD = dense_TD - hidden_TF[:, layout.shared_S] @ down_FD[layout.shared_S]
        bias_ED = layout.expert_bias_ED
        errors.append(expert_errors(target_TD, hidden_TF, down_FD, layout.experts_EN, bias_ED))
    error_TE = torch.cat(errors)
    tiny = torch.finfo(torch.float32).tiny
    score_TE = -error_TE / error_TE.mean().clamp_min(tiny)
    weight_ED, bias_E = ridge_fit(profile.ffn_inputs_ND.float(), score_TE, ROUTER_PENALTY)
    return _untrained(layout, "linear", weight_ED, bias_E=bias_E)


def representative_neurons(profile: LayerProfile, layout: ExpertLayout) -> Tensor:
    """Per expert the member nearest (L1) to the mean marker column of the expert, int64, (E,)."""
    _require_experts(layout)
    chosen = []
    for members_N in layout.experts_EN:
        binary_NT = marker_columns(profile.marker_neurons_TA, members_N, layout.intermediate_size)
        one_cluster_N = torch.zeros_like(members_N)
        distances_N = l1_distances(binary_NT, mean_columns(binary_NT, one_cluster_N, 1))[:, 0]
        chosen.append(members_N[int(distances_N.argmin())])
    return torch.stack(chosen)


def _require_experts(layout: ExpertLayout) -> None:
    if layout.num_routed_experts == 0:
        raise ValueError("a static layout has no routed experts to route to")


def _untrained(
    layout: ExpertLayout,
    kind: RouterKind,
    weight_ED: Tensor,
    up_weight_ED: Tensor | None = None,
    bias_E: Tensor | None = None,
) -> Router:
    """A router of the layout's weighting, with output scale and balance bias zero."""
    zeros_E = torch.zeros(weight_ED.shape[0], device=weight_ED.device)
    return Router(
        kind=kind,
        weight_ED=weight_ED.contiguous(),
        scale_E=zeros_E,
        balance_bias_E=zeros_E.clone(),
        up_weight_ED=up_weight_ED,
        bias_E=bias_E,
        weighting=layout.weighting,
        routed_scaling=layout.routed_scaling,
    )


ROUTERS: dict[str, RouterSpec] = {
    spec.name: spec
    for spec in (
        RouterSpec(
            name="mean-gate",
            kind="linear",
            summary="mean gate vector of each expert",
            source="ExpertWeaver, arXiv:2602.15521",
            build=mean_gate_router,
        ),
        RouterSpec(
            name="representative",
            kind="glu",
            summary="activation of one representative neuron per expert",
            source="CMoE, arXiv:2502.04416",
            build=representative_router,
        ),
        RouterSpec(
            name="ridge",
            kind="linear",
            summary="predicted contribution of each expert, by ridge regression",
            source="weaver",
            build=ridge_router,
            selections=("top-k", "threshold"),
        ),
        RouterSpec(
            name="error-ridge",
            kind="linear",
            summary="predicted error of each expert alone, by ridge regression",
            source="weaver",
            build=error_ridge_router,
        ),
        RouterSpec(
            name="random",
            kind="linear",
            summary="random vectors, the baseline for routers",
            source="baseline",
            build=random_router,
        ),
    )
}
