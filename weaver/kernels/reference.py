"""The MoE FFN, as plainly as it can be written. Every faster path must agree with it.

Storage: the neurons of a layer are permuted so that the shared ones come first, then expert by
expert; the shared expert and every routed expert are then row slices of three matrices (F', D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from weaver.algorithms.glu import ACTIVATIONS, GluWeights, glu_hidden
from weaver.artifacts.types import Router


@dataclass(frozen=True)
class Routing:
    """Which experts a token uses, and how much.

    Args:
        ids_TK: expert ids, int64, (T, K).
        weights_TK: factors of the experts' outputs, float32, (T, K).
        num_experts: E.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    num_experts: int

    def factors_TE(self) -> Tensor:
        """The factor of every expert for every token, 0 where it is skipped, (T, E)."""
        zeros_TE = self.weights_TK.new_zeros(self.ids_TK.shape[0], self.num_experts)
        return zeros_TE.scatter(1, self.ids_TK, self.weights_TK)


def router_probabilities(x_TD: Tensor, router: Router, activation: str) -> Tensor:
    """Router probabilities ``softmax(s)`` in float32, (T, E).

    ``linear``: ``s = x weight^T + bias``. ``glu``: ``s = |(x up_weight^T) * act(x weight^T)|``.

    Source: ExpertWeaver, arXiv:2602.15521 (linear, without the intercept); CMoE,
    arXiv:2502.04416, section 4.2 (glu).
    """
    x_TD = x_TD.float()
    bias_E = None if router.bias_E is None else router.bias_E.float()
    scores_TE = functional.linear(x_TD, router.weight_ED.float(), bias_E)
    if router.up_weight_ED is not None:
        up_TE = functional.linear(x_TD, router.up_weight_ED.float())
        scores_TE = (up_TE * ACTIVATIONS[activation](scores_TE)).abs()
    return scores_TE.softmax(dim=-1)


def route(x_TD: Tensor, router: Router, activation: str, top_k: int) -> Routing:
    """The K experts of every token and the factors of their outputs.

    Selection: top-K of ``softmax(s) + balance_bias``. Factor: ``1 + softmax(s) * scale``.

    Args:
        x_TD: FFN inputs, (T, D).
        router: the layer's router.
        activation: activation of the GLU, for the glu router.
        top_k: K.
    """
    probabilities_TE = router_probabilities(x_TD, router, activation)
    ids_TK = (probabilities_TE + router.balance_bias_E.float()).topk(top_k, dim=-1).indices
    chosen_TK = probabilities_TE.gather(1, ids_TK)
    weights_TK = 1.0 + chosen_TK * router.scale_E.float()[ids_TK]
    return Routing(ids_TK, weights_TK, router.weight_ED.shape[0])


def masked_forward(
    x_TD: Tensor,
    weights: GluWeights,
    routing: Routing | None,
    num_shared: int,
    expert_bias_ED: Tensor | None = None,
) -> Tensor:
    """``y = h_shared Wd_shared + sum_{e in top-K} w_e (h_e Wd_e + b_e) + output_bias``, (T, D).

    ``h_e`` are the neurons of expert e, ``Wd_e`` their rows of the down projection, ``b_e`` the
    expert's constant. Computes every neuron and multiplies it by its factor: the definition, at
    dense cost.

    Args:
        x_TD: FFN inputs, (T, D).
        weights: the permuted FFN, shared neurons first.
        routing: the tokens' experts; None for a static layer.
        num_shared: S.
        expert_bias_ED: constant b_e of every expert, (E, D), or None; not used by a static layer.
    """
    hidden_TF = glu_hidden(x_TD, weights)
    if routing is not None:
        factors_TE = routing.factors_TE().to(x_TD.dtype)
        # In place on a view: at this size a copy of (T, F) costs as much as the multiply-adds.
        routed_TEN = hidden_TF[:, num_shared:].unflatten(1, (routing.num_experts, -1))
        routed_TEN.mul_(factors_TE[:, :, None])
    y_TD = hidden_TF @ weights.down_FD
    if routing is not None and expert_bias_ED is not None:
        y_TD = torch.addmm(y_TD, factors_TE, expert_bias_ED)
    return y_TD if weights.output_bias_D is None else y_TD + weights.output_bias_D
