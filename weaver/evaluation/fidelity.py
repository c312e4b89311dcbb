"""How well a router finds the experts that matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weaver.algorithms.contributions import expert_contributions, expert_errors
from weaver.algorithms.glu import GluWeights, glu_forward, glu_hidden
from weaver.artifacts.types import ExpertLayout, Router
from weaver.kernels.reference import ExpertChoice, Routing, route
from weaver.models.moe import MoEFeedForward


@dataclass(frozen=True)
class RouterFidelity:
    """Agreement of a router with the selection that knows the experts' outputs.

    All are 0 for a router that chose nothing.

    Args:
        oracle_agreement: share of the chosen pairs of token and expert that the oracle picks too.
        chance_agreement: the same for a random choice: the share of all pairs that were chosen,
            K / E for top-k.
        captured_contribution: squared output norms of the chosen pairs over the oracle's; of
            experts that each stand for the whole FFN, what they are worth in their place.
        load_cv: standard deviation over mean of the experts' token shares.
    """

    oracle_agreement: float
    chance_agreement: float
    captured_contribution: float
    load_cv: float


@torch.no_grad()
def router_fidelity(
    x_TD: Tensor,
    weights: GluWeights,
    layout: ExpertLayout,
    router: Router,
    expert_bias_ED: Tensor | None = None,
    dense_TD: Tensor | None = None,
) -> RouterFidelity:
    """Compare a router with the oracle on some FFN inputs.

    The oracle takes the experts whose omission costs most, ``||h_e Wd_e + b_e||^2`` with b_e the
    expert's output bias (0 if there is none). It spends what the router spends. For "top-k" these
    are the K experts of every token; for "threshold" the ``T * K`` pairs of token and expert that
    cost most among all pairs of these tokens, with K the mean number that the router chose on them.
    Every expert is taken for itself: that the outputs of two may point the same way, and the factor
    that a trained router puts on them, do not count.

    Experts that each stand for the whole FFN are not missed where they are skipped. With the dense
    output y given, what an expert is worth to a token is how much nearer it alone comes to y than
    the worst one, ``max_i ||y - y_i||^2 - ||y - y_e||^2`` with ``y_e`` its output, the shared
    expert's included; the oracle then takes the nearest experts.

    Args:
        x_TD: FFN inputs, (T, D), float32.
        weights: the FFN, float32.
        layout: shared and routed neurons, by their rows in ``weights``.
        router: the router of the layer.
        expert_bias_ED: constant that an expert adds where it is chosen, (E, D), or None.
        dense_TD: output of the dense FFN, (T, D), where each expert stands for the whole of it.
    """
    hidden_TF = glu_hidden(x_TD, weights)
    parts = (hidden_TF, weights.down_FD, layout.experts_EN, expert_bias_ED)
    if dense_TD is None:
        contribution_TE = expert_contributions(*parts)
    else:
        rest_TD = dense_TD - hidden_TF[:, layout.shared_S] @ weights.down_FD[layout.shared_S]
        if weights.output_bias_D is not None:
            rest_TD = rest_TD - weights.output_bias_D
        error_TE = expert_errors(rest_TD, *parts)
        contribution_TE = error_TE.max(dim=1, keepdim=True).values - error_TE
    routing = route(x_TD, router, weights.activation, ExpertChoice(layout.top_k, layout.selection))
    oracle_TE = _oracle(contribution_TE, routing, layout)
    chosen_TE = routing.selected_TE()
    load_E = routing.counts_E().double()
    tiny = torch.finfo(torch.float32).tiny
    best = (contribution_TE * oracle_TE).sum().clamp_min(tiny)
    return RouterFidelity(
        oracle_agreement=float((oracle_TE & chosen_TE).sum()) / max(routing.num_pairs, 1),
        chance_agreement=routing.num_pairs / contribution_TE.numel(),
        captured_contribution=float((contribution_TE * chosen_TE).sum() / best),
        load_cv=float(load_E.std(correction=0) / load_E.mean().clamp_min(tiny)),
    )


def _oracle(contribution_TE: Tensor, routing: Routing, layout: ExpertLayout) -> Tensor:
    """The pairs of token and expert that contribute most, as many as the router chose, (T, E)."""
    none_TE = torch.zeros_like(contribution_TE, dtype=torch.bool)
    if layout.selection == "top-k":
        return none_TE.scatter(1, contribution_TE.topk(layout.top_k, dim=1).indices, value=True)
    pairs_P = contribution_TE.flatten().topk(routing.num_pairs).indices
    return none_TE.flatten().scatter(0, pairs_P, value=True).view_as(none_TE)


@torch.no_grad()
def module_fidelity(x_TD: Tensor, ffn: MoEFeedForward, dense: GluWeights) -> RouterFidelity:
    """``router_fidelity`` of a converted FFN with its own router and biases.

    Args:
        x_TD: inputs of the module, (T, D).
        ffn: a module with routed experts.
        dense: the FFN it was made from, float32.
    Raises:
        ValueError: the layer is static.
    """
    if ffn.router is None:
        raise ValueError("a static layer routes nothing")
    bias_ED = ffn.expert_bias
    return router_fidelity(
        x_TD.float(),
        ffn.weights().to(torch.float32),
        _stored_layout(ffn).to(x_TD.device),
        ffn.router.record(),
        None if bias_ED is None else bias_ED.float(),
        glu_forward(x_TD.float(), dense) if ffn.shape.averages_experts else None,
    )


def _stored_layout(ffn: MoEFeedForward) -> ExpertLayout:
    """The layout in terms of the module's own rows: shared neurons first, then expert by expert."""
    shape = ffn.shape
    rows = torch.arange(shape.total_neurons, device="cpu")
    return ExpertLayout(
        intermediate_size=shape.total_neurons,
        top_k=ffn.top_k,
        shared_S=rows[: shape.num_shared_neurons],
        experts_EN=rows[shape.num_shared_neurons :].view(ffn.num_routed_experts, -1),
        selection=shape.selection,
    )


@dataclass
class KeptInputs:
    """Some inputs of one converted FFN, filled while the model runs inside ``keep_inputs``.

    Args:
        layer: index of the decoder layer.
        ffn: the module.
        positions_N: positions in the stream of tokens that are kept, ascending.
    """

    layer: int
    ffn: MoEFeedForward
    positions_N: Tensor
    _tokens: int = 0
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, hidden: Tensor) -> None:
        """Take what is wanted of the next tokens."""
        x_TD = hidden.detach().reshape(-1, hidden.shape[-1])
        here_N = self.positions_N - self._tokens
        here_n = here_N[(here_N >= 0) & (here_N < x_TD.shape[0])]
        self._kept.append(x_TD[here_n.to(x_TD.device)])
        self._tokens += x_TD.shape[0]

    def inputs(self) -> Tensor:
        """Return the kept inputs in the order of the stream, (N, D), in the dtype of the model."""
        return torch.cat(self._kept)


@contextmanager
def keep_inputs(model: nn.Module, positions_N: Tensor) -> Iterator[list[KeptInputs]]:
    """Keep some FFN inputs of every routed layer while the block runs the model.

    Args:
        model: a converted model.
        positions_N: which tokens are kept, counted over all passes, ascending.
    Yields:
        One entry per layer with routed experts, in model order.
    """
    modules = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    kept = [
        KeptInputs(layer, ffn, positions_N)
        for layer, ffn in enumerate(modules)
        if ffn.num_routed_experts
    ]
    handles = []
    try:
        for entry in kept:

            def add(_module: nn.Module, inputs: tuple[Any, ...], entry: KeptInputs = entry) -> None:
                entry.add(inputs[0])

            handles.append(entry.ffn.register_forward_pre_hook(add))
        yield kept
    finally:
        for handle in handles:
            handle.remove()
