"""Speed-ups of converted FFNs as they are predicted for this machine, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weaver.kernels.backends import cpu_backend
from weaver.kernels.costs import LayerKind, Workload, costs_of
from weaver.models.accounting import LayerShape

# Tokens in one forward at which speeds are predicted: decoding, and a prompt.
SPEED_TOKENS = (1, 512)


def predicted_seconds(
    shape: LayerShape, hidden_size: int, intermediate_size: int, dtype: torch.dtype, tokens: int
) -> tuple[float, float]:
    """Seconds of the dense and of the converted FFN on this CPU, with torch's present threads.

    The converted one by the path that would be chosen, its router included; see ``Costs``. A
    threshold counts with its mean K, a static layer as its share of the dense neurons.

    Args:
        shape: the converted layer.
        hidden_size: D.
        intermediate_size: F of the dense layer.
        dtype: of weights and inputs.
        tokens: T, tokens in one forward.
    """
    kind = LayerKind(
        hidden_size=hidden_size,
        neurons=intermediate_size,
        width=shape.moe_intermediate_size or intermediate_size,
        dtype=dtype,
        device="cpu",
        backend=cpu_backend(intermediate_size * hidden_size, dtype),
        threads=torch.get_num_threads(),
    )
    costs = costs_of(kind)
    if not shape.n_routed_experts:
        masked = costs.at(costs.masked, tokens)
        return costs.at(costs.dense, tokens), masked * shape.num_shared_neurons / intermediate_size
    pairs = tokens * shape.num_experts_per_tok
    work = Workload(shape.num_shared_neurons, shape.n_routed_experts, tokens, pairs)
    # Experts that overlap are stored with more neurons than the dense layer has.
    dense = costs.at(costs.dense, tokens)
    if shape.total_neurons > intermediate_size:
        kind = kind._replace(neurons=shape.total_neurons)
        costs = costs_of(kind)
    chosen = costs.seconds(work, kind, costs.faster(work, kind))
    return dense, chosen + costs.at(costs.routing, tokens)


def predicted_speedup(
    shapes: Sequence[LayerShape],
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    tokens: int,
) -> float:
    """Dense over converted seconds of some FFNs together; see ``predicted_seconds``."""
    seconds = [
        predicted_seconds(shape, hidden_size, intermediate_size, dtype, tokens) for shape in shapes
    ]
    return sum(dense for dense, _ in seconds) / sum(moe for _, moe in seconds)
