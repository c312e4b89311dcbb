"""Experts that are FFNs of their own: one module per expert in the place of a layer's fused ones.

Three kinds of FFN modules stand here in turn: dense ones while a model is calibrated, converted
ones afterwards, and none where only the routing of the outer level is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from weaver.kernels.reference import ExpertChoice, Routing, route
from weaver.models.accounting import LayerShape
from weaver.models.families import Family
from weaver.models.moe import MoEFeedForward, MoERouter
from weaver.models.sites import AnyShape, TwoLevelShape

# Told the inputs of a MoE layer's experts, (T, D), and which of them every token uses.
RoutingObserver = Callable[[Tensor, Routing], None]


class ExpertList(nn.ModuleList):
    """The routed experts of a MoE layer, called as transformers calls fused experts.

    ``y_t = sum_k w_tk expert_{i_tk}(x_t)``, summed in at least float32. Every expert computes only
    the tokens that the outer router sends to it.

    Args:
        experts: one FFN each.
        observer: told what reaches the experts.
        num_experts: E, where no expert is there and nothing is computed; a pass that only observes.
    """

    def __init__(
        self,
        experts: Iterable[nn.Module],
        observer: RoutingObserver | None = None,
        *,
        num_experts: int | None = None,
    ) -> None:
        super().__init__(experts)
        self.observer = observer
        self.num_experts = len(self) if num_experts is None else num_experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, in the shape of the inputs.

        Args:
            hidden_states: FFN inputs of T tokens, (..., D).
            top_k_index: expert ids, no id twice for a token; E stands for none, (T, K).
            top_k_weights: factors of the experts' outputs, (T, K).
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = Routing.of_slots(top_k_index, top_k_weights, self.num_experts)
        return self.combine(x_TD, routing).view_as(hidden_states)

    def combine(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The same for given pairs of token and expert."""
        if self.observer is not None:
            self.observer(x_TD, routing)
        total_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for expert, module in enumerate(self):
            pairs_p = (routing.experts_P == expert).nonzero().flatten()
            if pairs_p.numel() == 0:
                continue
            tokens_p = routing.tokens_P[pairs_p]
            factors_p1 = routing.weights_P[pairs_p, None].to(total_TD.dtype)
            y_pD = module(x_TD[tokens_p]).to(total_TD.dtype)
            total_TD.index_add_(0, tokens_p, y_pD * factors_p1)
        return total_TD.to(x_TD.dtype)


class InnerFfns(nn.Module):
    """The FFNs of one MoE layer, to be put into it by ``place``.

    Args:
        experts: the routed experts.
        shared: the layer's own shared expert; None without one.
        outer: the outer level without its experts, where weaver made it; None for the block of a
            stock architecture, which is in the layer already.
    """

    def __init__(
        self,
        experts: ExpertList,
        shared: nn.Module | None = None,
        outer: TwoLevelFeedForward | None = None,
    ) -> None:
        super().__init__()
        self.experts = experts
        self.shared = shared
        self.outer = outer


class TwoLevelFeedForward(nn.Module):
    """A layer that weaver split, whose shared part and experts are FFNs that are split again.

    ``y = shared(x) + sum_{e selected by x} w_e expert_e(x) + output_bias`` with the router of the
    first conversion; constants of its experts are output biases of the FFNs.

    Args:
        outer: shape of the first conversion.
        hidden_size: D.
        activation: weaver's name of the GLU's activation, for a glu router.
        std: of the weights' initial values.
    """

    def __init__(
        self, outer: LayerShape, hidden_size: int, activation: str, *, std: float = 0.02
    ) -> None:
        super().__init__()
        self.outer = outer
        self.activation = activation
        self.router = MoERouter(outer, hidden_size, std=std)
        self.output_bias = nn.Parameter(torch.zeros(hidden_size)) if outer.output_bias else None
        self.experts = ExpertList([])
        self.shared: nn.Module | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        shape = self.outer
        routing = route(
            x_TD,
            self.router(),
            self.activation,
            ExpertChoice(shape.num_experts_per_tok, shape.selection),
        )
        y_TD = self.experts.combine(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias
        return y_TD.view_as(hidden_states)


def converted_module(
    shape: AnyShape, hidden_size: int, activation: str, *, std: float = 0.02
) -> MoEFeedForward | InnerFfns:
    """Build the module that replaces the FFN or FFNs of a converted layer, with random weights.

    Args:
        shape: of the converted layer.
        hidden_size: D.
        activation: weaver's name of the GLU's activation.
        std: of the weights' initial values.

    Returns:
        A ``MoEFeedForward``; for a two-level shape an ``InnerFfns`` with one per expert.
    """

    def ffn(inner: LayerShape) -> MoEFeedForward:
        return MoEFeedForward(inner, hidden_size, activation, std=std)

    if not isinstance(shape, TwoLevelShape):
        return ffn(shape)
    return InnerFfns(
        ExpertList([ffn(expert) for expert in shape.experts]),
        None if shape.shared is None else ffn(shape.shared),
        None
        if shape.outer is None
        else TwoLevelFeedForward(shape.outer, hidden_size, activation, std=std),
    )


def place(layer: nn.Module, family: Family, ffn: nn.Module) -> None:
    """Put an FFN, or those of a MoE layer, into a decoder layer."""
    if not isinstance(ffn, InnerFfns):
        setattr(layer, family.ffn, ffn)
        return
    if ffn.outer is not None:
        setattr(layer, family.ffn, ffn.outer)
    block = getattr(layer, family.ffn)
    block.experts = ffn.experts
    if ffn.shared is not None:
        setattr(block, family.shared, ffn.shared)
