"""Which down projection a prefill takes: a product per pair, or one over all neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Variant = Literal["pairs", "dense"]

# Multiply-adds that a data-centre GPU does while it moves one byte, in 16 bits and in float32. The
# H100 SXM's data sheet: 989 TFLOP/s of dense bfloat16, 67 TFLOP/s of float32, 3.35 TB/s.
MACS_PER_BYTE = {2: 148.0, 4: 10.0}


@dataclass(frozen=True)
class PrefillShape:
    """Sizes that decide what the down projection of a prefill moves and computes.

    Args:
        num_tokens: T.
        hidden_size: D.
        num_experts: E.
        width: N.
        top_k: K, slots per token. Slots not in use count: how many are is on the device.
        element_size: s, bytes of an element.
    """

    num_tokens: int
    hidden_size: int
    num_experts: int
    width: int
    top_k: int
    element_size: int


def down_cost(shape: PrefillShape, variant: Variant) -> float:
    """Bytes that could be moved while the variant runs: a model, with nothing measured in it.

    With P = T K pairs, R = E N neurons and r multiply-adds per byte, each pass over memory lasts
    as long as the slower of its bytes and its arithmetic:

    - pairs: ``max(s (P N + R D + P D), P N D / r) + s (P D + T D)``. Reads h of the pairs and
      the weights and stores an output per pair; then reads these and sums them.
    - dense: ``s T R + max(s (T R + R D + T D), T R D / r)``. Fills (T, R) with zeros, then one
      GEMM with skipped neurons as zeros.

    Storing h itself costs both the same and is left out.
    """
    s, rate = shape.element_size, MACS_PER_BYTE[shape.element_size]
    pairs, neurons = shape.num_tokens * shape.top_k, shape.num_experts * shape.width
    outputs = shape.num_tokens * shape.hidden_size
    weights = neurons * shape.hidden_size
    if variant == "pairs":
        per_pair = pairs * shape.hidden_size
        moved = s * (pairs * shape.width + weights + per_pair)
        return max(moved, per_pair * shape.width / rate) + s * (per_pair + outputs)
    hidden = shape.num_tokens * neurons
    moved = s * (hidden + weights + outputs)
    return s * hidden + max(moved, hidden * shape.hidden_size / rate)


def choose_variant(shape: PrefillShape) -> Variant:
    """The cheaper one by ``down_cost``: ``dense`` for fine experts, ``pairs`` for coarse ones."""
    return "pairs" if down_cost(shape, "pairs") <= down_cost(shape, "dense") else "dense"
