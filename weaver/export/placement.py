"""Layers with different splits in the one shape that a stock architecture has for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from weaver.export.base import ALWAYS, NEVER
from weaver.models.accounting import LayerShape

# Grouped products of 16-bit matrices want rows of whole 16 bytes (torch's grouped_mm, which
# transformers calls); what an expert lacks to a multiple of so many neurons is zeros.
WIDTHS = 8


@dataclass(frozen=True)
class StockExpert:
    """One routed expert of the stock model.

    Args:
        expert: the converted model's routed expert that it is, or ``ALWAYS`` or ``NEVER``.
        start: its first neuron in the permuted FFN.
        neurons: how many neurons it holds; the rest of its width is zero.
    """

    expert: int
    start: int = 0
    neurons: int = 0


@dataclass(frozen=True)
class Placement:
    """One shape for all layers.

    ``n * N`` neurons of a layer lie in the shared expert. Shared neurons beyond that become routed
    experts that are always selected; a layer that selects fewer experts than others gets empty ones
    that are always selected, and one that has fewer gets empty ones that never are.

    Args:
        width: N, neurons of every expert.
        num_shared: n, shared experts.
        num_routed: E, routed experts of every layer.
        top_k: K, routed experts selected for every token in every layer.
        layers: the E experts of each layer.
    """

    width: int
    num_shared: int
    num_routed: int
    top_k: int
    layers: tuple[tuple[StockExpert, ...], ...]

    def shared_neurons(self, shape: LayerShape) -> int:
        """How many of a layer's neurons lie in its shared expert; they are the first ones."""
        return min(shape.num_shared_neurons, self.num_shared * self.width)

    @property
    def padded_neurons(self) -> int:
        """Neurons that a token uses, zeros included: (n + K) * N."""
        return (self.num_shared + self.top_k) * self.width


def place(shapes: Sequence[LayerShape]) -> Placement:
    """The placement with the fewest neurons per token; of several, the one with most shared.

    ``K = max_l (K_l + ceil((S_l - n N)^+ / N))`` for n shared experts, and a token uses
    ``(n + K) N`` neurons. N is the widest expert's, rounded up to a multiple of ``WIDTHS``.

    Args:
        shapes: shape of every layer.
    Raises:
        ValueError: no layer has routed experts.
    """
    widest = max(shape.moe_intermediate_size for shape in shapes)
    if widest == 0:
        raise ValueError("no layer has routed experts")
    width = -(-widest // WIDTHS) * WIDTHS
    most = max(1, -(-max(shape.num_shared_neurons for shape in shapes) // width))

    def cost(num_shared: int) -> tuple[int, int]:
        return num_shared + _top_k(shapes, width, num_shared), -num_shared

    num_shared = min(range(1, most + 1), key=cost)
    top_k = _top_k(shapes, width, num_shared)
    # Stock routers look for the two best experts of a group.
    num_routed = max(2, *(_needed(shape, top_k) for shape in shapes))
    layers = tuple(_experts(shape, width, num_shared, top_k, num_routed) for shape in shapes)
    return Placement(width, num_shared, num_routed, top_k, layers)


def blocks(rows_FD: Tensor, experts: Sequence[StockExpert], width: int) -> list[Tensor]:
    """Rows of every expert, filled with zeros to the width, E times (N, D)."""
    return [padded(rows_FD[e.start : e.start + e.neurons], width) for e in experts]


def padded(rows_ND: Tensor, width: int) -> Tensor:
    """Rows with zero rows after them, (width, D)."""
    filled_ND = rows_ND.new_zeros(width, rows_ND.shape[1])
    filled_ND[: rows_ND.shape[0]] = rows_ND
    return filled_ND


def per_expert(values_E: Tensor, experts: Sequence[StockExpert], always: Tensor | float) -> Tensor:
    """A row per stock expert: the routed expert's, ``always`` or zero."""
    shape = (len(experts), *values_E.shape[1:])
    placed = torch.zeros(shape, dtype=values_E.dtype)
    for slot, expert in enumerate(experts):
        if expert.expert >= 0:
            placed[slot] = values_E[expert.expert]
        elif expert.expert == ALWAYS:
            placed[slot] = always
    return placed


def _top_k(shapes: Sequence[LayerShape], width: int, num_shared: int) -> int:
    return max(s.num_experts_per_tok + len(_beyond(s, width, num_shared)) for s in shapes)


def _beyond(shape: LayerShape, width: int, num_shared: int) -> list[StockExpert]:
    """Shared neurons that the shared expert has no room for, as experts."""
    first = min(shape.num_shared_neurons, num_shared * width)
    edges = [*range(first, shape.num_shared_neurons, width), shape.num_shared_neurons]
    return [StockExpert(ALWAYS, a, b - a) for a, b in pairwise(edges) if b > a]


def _needed(shape: LayerShape, top_k: int) -> int:
    """Experts of a layer with the empty ones that are always selected."""
    return shape.n_routed_experts + top_k - shape.num_experts_per_tok


def _experts(
    shape: LayerShape, width: int, num_shared: int, top_k: int, num_routed: int
) -> tuple[StockExpert, ...]:
    own = shape.moe_intermediate_size
    routed = [
        StockExpert(e, shape.num_shared_neurons + e * own, own)
        for e in range(shape.n_routed_experts)
    ]
    beyond = _beyond(shape, width, num_shared)
    idle = top_k - shape.num_experts_per_tok - len(beyond)
    used = [*beyond, *([StockExpert(ALWAYS)] * idle), *routed]
    return (*used, *([StockExpert(NEVER)] * (num_routed - len(used))))
