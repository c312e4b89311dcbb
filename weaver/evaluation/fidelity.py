"""How well a router finds the experts that matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_hidden
from weaver.artifacts.types import ExpertLayout, Router
from weaver.kernels.reference import route


@dataclass(frozen=True)
class RouterFidelity:
    """Agreement of a router with the selection that knows the experts' outputs.

    Args:
        oracle_agreement: mean share of a token's K experts that the oracle picks too.
        chance_agreement: the same for a random choice, K / E.
        captured_contribution: squared output norms of the chosen experts over the oracle's.
        load_cv: standard deviation over mean of the experts' token shares.
    """

    oracle_agreement: float
    chance_agreement: float
    captured_contribution: float
    load_cv: float


@torch.no_grad()
def router_fidelity(
    x_TD: Tensor, weights: GluWeights, layout: ExpertLayout, router: Router
) -> RouterFidelity:
    """Compare a router with the oracle on some FFN inputs.

    The oracle takes the K experts with the largest ``||h_e Wd_e||^2``.

    Args:
        x_TD: FFN inputs, (T, D), float32.
        weights: the dense FFN, float32.
        layout: shared and routed neurons.
        router: the router of the layer.
    """
    contribution_TE = expert_contributions(x_TD, weights, layout)
    top_k, experts = layout.top_k, layout.num_routed_experts
    oracle_TK = contribution_TE.topk(top_k, dim=1).indices
    chosen_TK = route(x_TD, router, weights.activation, top_k).ids_TK
    oracle_TE = torch.zeros_like(contribution_TE).scatter(1, oracle_TK, 1.0)
    chosen_TE = torch.zeros_like(contribution_TE).scatter(1, chosen_TK, 1.0)
    load_E = chosen_TE.mean(0)
    best = (contribution_TE * oracle_TE).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return RouterFidelity(
        oracle_agreement=float((oracle_TE * chosen_TE).sum() / (top_k * x_TD.shape[0])),
        chance_agreement=top_k / experts,
        captured_contribution=float((contribution_TE * chosen_TE).sum() / best),
        load_cv=float(load_E.std(correction=0) / load_E.mean()),
    )


def expert_contributions(x_TD: Tensor, weights: GluWeights, layout: ExpertLayout) -> Tensor:
    """Squared norm of every routed expert's output for every token, ``||h_e Wd_e||^2``, (T, E)."""
    columns = []
    for neurons_N in layout.experts_EN:
        expert = weights.select(neurons_N)
        columns.append((glu_hidden(x_TD, expert) @ expert.down_FD).square().sum(1))
    return torch.stack(columns, dim=1)
