"""The MoE FFN, as plainly as it can be written. Every faster path must agree with it.

Storage: the neurons of a layer are permuted so that the shared ones come first, then expert by
expert; the shared expert and every routed expert are then row slices of three matrices (F', D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from weaver.algorithms.glu import ACTIVATIONS, GluWeights, glu_hidden
from weaver.artifacts.types import Router, Selection


@dataclass(frozen=True)
class MoELayer:
    """One converted FFN, as every implementation takes it.

    Args:
        weights: the permuted FFN, shared neurons first.
        num_shared: S.
        expert_bias_ED: constant b_e of every expert, (E, D), or None; not used by a static layer.
        router: of its experts; None for a static layer and where the routing is given.
    """

    weights: GluWeights
    num_shared: int
    expert_bias_ED: Tensor | None = None
    router: Router | None = None

    def to(self, dtype: torch.dtype) -> MoELayer:
        """The same in another dtype, but for the router, whose scores are float32 in any."""
        bias_ED = None if self.expert_bias_ED is None else self.expert_bias_ED.to(dtype)
        return replace(self, weights=self.weights.to(dtype), expert_bias_ED=bias_ED)

    def shared(self) -> GluWeights:
        """The shared expert with the output bias, without copying."""
        return self.weights.rows(0, self.num_shared)

    def routed(self) -> GluWeights:
        """All routed experts without the output bias, without copying."""
        end = self.weights.intermediate_size
        return self.weights.rows(self.num_shared, end, output_bias=False)


@dataclass(frozen=True)
class ExpertChoice:
    """The rule that chooses a token's experts by their scores.

    Args:
        top_k: K; not used by a threshold.
        selection: K experts for every token, or all whose scores exceed a threshold.
        lowest_T: what a score must exceed under a threshold, -inf for every expert, (T,); 0 if left
            out. See ``weaver.models.pacing``.
    """

    top_k: int
    selection: Selection = "top-k"
    lowest_T: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """Which experts each token uses, and how much: the P selected pairs of token and expert.

    A token may have any number of pairs, none included; no pair stands twice. Pairs are ordered by
    token; those of one token by falling score for top-k, by expert for a threshold.

    Args:
        tokens_P: token of each pair, int64, ascending, (P,).
        experts_P: expert of each pair, int64, (P,).
        weights_P: factor of the expert's output for that token, float32, (P,).
        num_tokens: T.
        num_experts: E.
        top_k: K if every token has K pairs, None if their number differs.
    """

    tokens_P: Tensor
    experts_P: Tensor
    weights_P: Tensor
    num_tokens: int
    num_experts: int
    top_k: int | None = None

    @classmethod
    def of_top_k(cls, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Self:
        """K experts for every token.

        Args:
            ids_TK: expert ids, int64, (T, K).
            weights_TK: factors of their outputs, float32, (T, K).
            num_experts: E.
        """
        tokens, top_k = ids_TK.shape
        tokens_P = torch.arange(tokens, device=ids_TK.device).repeat_interleave(top_k)
        return cls(tokens_P, ids_TK.reshape(-1), weights_TK.reshape(-1), tokens, num_experts, top_k)

    @classmethod
    def of_slots(cls, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Self:
        """Any number of experts for a token: inverse of ``slots``.

        Args:
            ids_TK: expert ids, no id twice for a token; E stands for none, (T, K).
            weights_TK: factors of their outputs, (T, K).
            num_experts: E.
        """
        tokens_P, slots_P = (ids_TK < num_experts).nonzero(as_tuple=True)
        experts_P, weights_P = ids_TK[tokens_P, slots_P].long(), weights_TK[tokens_P, slots_P]
        return cls(tokens_P, experts_P, weights_P.float(), ids_TK.shape[0], num_experts)

    def slots(self) -> tuple[Tensor, Tensor]:
        """The same with one row per token: expert ids and factors, (T, K).

        Where the number of pairs differs from token to token, K is E and a slot that is not used
        holds the id E and the factor 0.
        """
        if self.top_k is not None:
            shape = (self.num_tokens, self.top_k)
            return self.experts_P.view(shape), self.weights_P.view(shape)
        ids_E = torch.arange(self.num_experts, device=self.experts_P.device)
        return torch.where(self.selected_TE(), ids_E, self.num_experts), self.factors_TE()

    @property
    def num_pairs(self) -> int:
        """P, T * K for top-k."""
        return self.experts_P.shape[0]

    def factors_TE(self) -> Tensor:
        """The factor of every expert for every token, 0 where it is skipped, (T, E)."""
        zeros_TE = self.weights_P.new_zeros(self.num_tokens, self.num_experts)
        return zeros_TE.index_put((self.tokens_P, self.experts_P), self.weights_P)

    def selected_TE(self) -> Tensor:
        """Whether a token uses an expert, bool, (T, E)."""
        nowhere_TE = self.experts_P.new_zeros(self.num_tokens, self.num_experts, dtype=torch.bool)
        return nowhere_TE.index_put(
            (self.tokens_P, self.experts_P), torch.ones_like(self.experts_P, dtype=torch.bool)
        )

    def counts_E(self) -> Tensor:
        """Tokens that use each expert, int64, (E,)."""
        return torch.bincount(self.experts_P, minlength=self.num_experts)

    def counts_T(self) -> Tensor:
        """Experts that each token uses, int64, (T,)."""
        return torch.bincount(self.tokens_P, minlength=self.num_tokens)


def router_logits(x_TD: Tensor, router: Router, activation: str) -> Tensor:
    """Router logits ``s`` in float32, (T, E).

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
    return scores_TE


def route(
    x_TD: Tensor,
    router: Router,
    activation: str,
    choice: ExpertChoice,
) -> Routing:
    """The experts of every token and the factors of their outputs.

    Selection: the K largest of ``softmax(s) + balance_bias`` ("top-k"), or all with
    ``s + balance_bias > lowest`` ("threshold"). Factor, with ``p = softmax(s)``:
    ``1 + p_e * scale_e`` for the weighting "unit", ``c * p_e / sum_{chosen} p`` for "softmax".

    Deviation: the denominator of "softmax" counts as a constant in gradients, so that the gradient
    of a factor w_e is ``dw_e/ds_i = w_e (delta_ei - p_i)``. With K = 1 the factor is exactly c, and
    its true gradient 0, from which no router could learn (straight-through).

    Args:
        x_TD: FFN inputs, (T, D).
        router: the layer's router.
        activation: activation of the GLU, for the glu router.
        choice: how experts are selected.

    Raises:
        ValueError: a threshold on a glu router: its scores are not negative, and it has no
            intercept that could hold the threshold. Softmax weights with a threshold, which may
            select nothing.
    """
    experts = router.weight_ED.shape[0]
    ids_TK, weights_TK = route_slots(x_TD, router, activation, choice)
    if choice.selection == "top-k":
        return Routing.of_top_k(ids_TK, weights_TK, experts)
    return Routing.of_slots(ids_TK, weights_TK, experts)


def route_to_all(x_TD: Tensor, router: Router, activation: str, temperature: float) -> Routing:
    """Every expert for every token: ``w_te = c * softmax(s_t / temperature)_e``.

    For training a router, whose gradient then comes from all experts. The balance bias, which acts
    on selection alone, plays no part.

    Args:
        x_TD: FFN inputs, (T, D).
        router: the layer's router, with softmax weights.
        activation: activation of the GLU, for the glu router.
        temperature: above 1 evens the weights out, below 1 sharpens them.

    Source: DIVE, arXiv:2506.09351, retraining of the router.
    """
    scores_TE = router_logits(x_TD, router, activation)
    weights_TE = router.routed_scaling * (scores_TE / temperature).softmax(dim=-1)
    tokens, experts = weights_TE.shape
    ids_TE = torch.arange(experts, device=x_TD.device).expand(tokens, experts)
    return Routing.of_top_k(ids_TE, weights_TE, experts)


def route_slots(
    x_TD: Tensor,
    router: Router,
    activation: str,
    choice: ExpertChoice,
) -> tuple[Tensor, Tensor]:
    """The same as ``Routing.slots``: expert ids and factors, (T, K), or (T, E) for a threshold.

    Shapes do not depend on values, so that nothing waits for a GPU.

    Raises:
        ValueError: as ``route``.
    """
    if choice.selection == "threshold" and router.kind != "linear":
        raise ValueError(f"a {router.kind} router selects by top-k, only a linear one by threshold")
    if choice.selection == "threshold" and router.weighting == "softmax":
        raise ValueError("softmax weights need selection by top-k")
    scores_TE = router_logits(x_TD, router, activation)
    probabilities_TE = scores_TE.softmax(dim=-1)
    weights_TE = 1.0 + probabilities_TE * router.scale_E.float()
    balance_bias_E = router.balance_bias_E.float()
    if choice.selection == "top-k":
        ids_TK = (probabilities_TE + balance_bias_E).topk(choice.top_k, dim=-1).indices
        if router.weighting == "softmax":
            return ids_TK, router.routed_scaling * _shares(scores_TE, ids_TK)
        return ids_TK, weights_TE.gather(1, ids_TK)
    experts = router.weight_ED.shape[0]
    ids_E = torch.arange(experts, device=x_TD.device)
    lowest = 0.0 if choice.lowest_T is None else choice.lowest_T[:, None]
    return torch.where(scores_TE + balance_bias_E > lowest, ids_E, experts), weights_TE


def _shares(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """``p_e / sum_{chosen} p`` with the sum constant in gradients, (T, K).

    In logarithms: a balance bias may choose experts whose probabilities are all 0 in float32.
    """
    chosen_TK = scores_TE.log_softmax(dim=-1).gather(1, ids_TK)
    return (chosen_TK - chosen_TK.detach().logsumexp(dim=-1, keepdim=True)).exp()


def masked_forward(x_TD: Tensor, layer: MoELayer, routing: Routing | None) -> Tensor:
    """``y = h_shared Wd_shared + sum_{e selected} w_e (h_e Wd_e + b_e) + output_bias``, (T, D).

    ``h_e`` are the neurons of expert e, ``Wd_e`` their rows of the down projection, ``b_e`` the
    expert's constant. Computes every neuron and multiplies it by its factor: the definition, at
    dense cost.

    Args:
        x_TD: FFN inputs, (T, D).
        layer: the converted FFN.
        routing: the tokens' experts; None for a static layer.
    """
    weights = layer.weights
    hidden_TF = glu_hidden(x_TD, weights)
    if routing is not None:
        factors_TE = routing.factors_TE().to(x_TD.dtype)
        # In place on a view: at this size a copy of (T, F) costs as much as the multiply-adds.
        routed_TEN = hidden_TF[:, layer.num_shared :].unflatten(1, (routing.num_experts, -1))
        routed_TEN.mul_(factors_TE[:, :, None])
    y_TD = hidden_TF @ weights.down_FD
    if routing is not None and layer.expert_bias_ED is not None:
        y_TD = torch.addmm(y_TD, factors_TE, layer.expert_bias_ED)
    return y_TD if weights.output_bias_D is None else y_TD + weights.output_bias_D
