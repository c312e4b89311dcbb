"""How fast the GPU kernels could be: a model made of data-sheet figures, never a measurement.

An FFN is a sequence of launches of ``launch_seconds + max(FLOPs / rate, bytes / bandwidth)``. Its
weights have 16 bits; every token selects K experts uniformly, independently of the others; a launch
reads a weight once and finds nothing in a cache. ``docs/roofline.md`` says what that leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
from scipy.special import bdtrc

from weaver.kernels.gpu.configurations import DECODE_TOKENS, tile_rows
from weaver.kernels.gpu.variants import PrefillShape, Variant, choose_variant

NOTE = "Predicted by a byte and FLOP model from data-sheet figures; nothing was measured."

SIZE = 2  # bytes of a weight or an activation
# Operations of torch that are not views, in reference.route with Routing.slots besides the product
# and the cast of its inputs, and in gpu.dispatch.
ROUTING_LAUNCHES = 12
DISPATCH_LAUNCHES = 16
MAX_BATCH = 16  # up to so many tokens are one step of as many sequences; more are one prompt
CONTEXT = 512  # positions in the cache of a sequence that decodes


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet, and the shares of it that are assumed to be attainable.

    Args:
        matrix_flops: FLOP/s of 16-bit matrix products with float32 sums, without sparsity.
        vector_flops: FLOP/s in float32 outside of matrix units.
        bandwidth: of the memory, bytes/s.
        launch_seconds: cost of a launch, assumed for kernels in a CUDA graph.
        gemm_share: assumed share of the FLOP/s that a library's GEMM reaches.
        routed_share: the same for the Triton GEMMs over tiles.
        memory_share: assumed share of the bandwidth that a kernel reaches.
    """

    matrix_flops: float
    vector_flops: float
    bandwidth: float
    launch_seconds: float = 2e-6
    gemm_share: float = 0.7
    routed_share: float = 0.7
    memory_share: float = 0.9

    def seconds(self, launches: Sequence[Launch]) -> float:
        """Time of launches that run one after the other."""
        gemm, routed = (self.matrix_flops * s for s in (self.gemm_share, self.routed_share))
        rates = {"gemm": gemm, "routed": routed, "vector": self.vector_flops * self.gemm_share}
        bandwidth = self.bandwidth * self.memory_share
        busy = (max(each.flops / rates[each.unit], each.moved / bandwidth) for each in launches)
        return self.launch_seconds * len(launches) + sum(busy)

    @property
    def ideal(self) -> Device:
        """The same at full rates and without a cost of launching."""
        return replace(self, launch_seconds=0.0, gemm_share=1.0, routed_share=1.0, memory_share=1.0)


# Sources: data sheets of NVIDIA A100 (80 GB SXM), H100 and H200 (SXM) and HGX B200 (one of its
# eight), whose products are given with sparsity from H100 on, halved here; NVIDIA GA102 whitepaper,
# where float32 sums halve the rate of products; data sheet of AMD Instinct MI300X.
DEVICES = {
    "a100": Device(312e12, 19.5e12, 2.039e12),
    "h100": Device(989e12, 67e12, 3.35e12),
    "h200": Device(989e12, 67e12, 4.8e12),
    "b200": Device(2250e12, 75e12, 7.7e12),
    "rtx3090": Device(71e12, 35.6e12, 0.936e12),
    "mi300x": Device(1307.4e12, 163.4e12, 5.3e12),
}


@dataclass(frozen=True)
class Launch:
    """A kernel: bytes moved, FLOPs with those of rows that only fill up a tile, what computes."""

    name: str
    moved: float
    flops: float = 0.0
    unit: Literal["gemm", "routed", "vector"] = "gemm"


@dataclass(frozen=True)
class Layer:
    """A converted FFN: D, S shared neurons, E experts of N neurons, mean K per token in (0, E]."""

    hidden_size: int
    num_shared: int
    num_experts: int
    width: int
    mean_experts: float

    def __post_init__(self) -> None:
        if not 0 < self.mean_experts <= self.num_experts:
            raise ValueError(f"{self.mean_experts:g} of {self.num_experts} experts per token")

    @property
    def share(self) -> float:
        """K / E, also the part of the dense GEMM's rate at which routed GEMMs break even."""
        return self.mean_experts / self.num_experts

    def union(self, tokens: int) -> float:
        """Expected number of experts that any of T tokens selects, ``E (1 - (1 - K / E)^T)``."""
        return self.num_experts * (1 - (1 - self.share) ** tokens)

    def variant(self, tokens: int) -> Variant | Literal["decode"]:
        """Which kernels ``gpu.op`` takes."""
        if tokens <= DECODE_TOKENS:
            return "decode"
        experts = (self.num_experts, self.width, math.ceil(self.mean_experts))
        return choose_variant(PrefillShape(tokens, self.hidden_size, *experts, SIZE))

    def least(self, tokens: int) -> list[Launch]:
        """Return the least FLOPs and bytes of the dense FFN and of this one, a launch each.

        ``2 T D (3 A + r)`` FLOPs and ``D (3 R + r + 2 T)`` values: A neurons are computed per token
        and R read for any, the router has r rows; (F, F, 0) and (S + K N, S + U N, E).
        """
        counts = (self.num_experts, self.mean_experts, self.union(tokens))
        full, active, read = (self.num_shared + count * self.width for count in counts)
        found = []
        for a, r, rows in ((full, full, 0), (active, read, self.num_experts)):
            moved = SIZE * self.hidden_size * (3 * r + rows + 2 * tokens)
            found.append(Launch("least", moved, 2 * tokens * self.hidden_size * (3 * a + rows)))
        return found


def expected_tiles(tokens: int, share: float, rows: int) -> float:
    """``E[ceil(n / rows)] = sum_j P(n > j rows)``, n ~ Binomial(T, share): tiles of one expert."""
    return float(bdtrc(np.arange(0, tokens, rows), tokens, share).sum())


def gemm(name: str, tokens: int, inputs: int, outputs: int) -> Launch:
    """A dense product: ``2 T' I O`` FLOPs, T' = T in full tiles, and ``T I + I O + T O`` values."""
    rows = tile_rows(tokens, 1, SIZE)
    moved = SIZE * (tokens * inputs + inputs * outputs + tokens * outputs)
    return Launch(name, moved, 2 * math.ceil(tokens / rows) * rows * inputs * outputs)


def dense_launches(tokens: int, hidden: int, neurons: int) -> list[Launch]:
    """A dense FFN, or a shared expert: three GEMMs, and the activation in one pass."""
    gate, up = (gemm(name, tokens, hidden, neurons) for name in ("gate", "up"))
    activation = Launch("activation", SIZE * 3 * tokens * neurons)
    return [gate, up, activation, gemm("down", tokens, neurons, hidden)]


def moe_launches(layer: Layer, tokens: int) -> list[Launch]:
    """Router in float32, shared expert, routed experts, and the sum of the two."""
    inputs, scores = tokens * layer.hidden_size, tokens * layer.num_experts
    router = 4 * (inputs + layer.num_experts * layer.hidden_size + scores)
    routing = Launch("router", router, 2 * scores * layer.hidden_size, "vector")
    selection = [Launch("selection", 8 * scores)] * ROUTING_LAUNCHES
    shared = dense_launches(tokens, layer.hidden_size, layer.num_shared) if layer.num_shared else []
    variant = layer.variant(tokens)
    routed = decode(layer, tokens) if variant == "decode" else prefill(layer, tokens, variant)
    cast, add = Launch("cast", (SIZE + 4) * inputs), Launch("sum of parts", SIZE * 3 * inputs)
    return [cast, routing, *selection, *shared, *routed, add]


def decode(layer: Layer, tokens: int) -> list[Launch]:
    """Two launches that read the union of the experts and compute in float32."""
    pairs, weights = tokens * layer.mean_experts, layer.width * layer.hidden_size
    others = SIZE * tokens * layer.hidden_size + 4 * pairs * layer.width
    read = SIZE * layer.union(tokens) * weights
    hidden = Launch("decode gate, up", others + 2 * read, 4 * pairs * weights, "vector")
    return [hidden, Launch("decode down", others + read, 2 * pairs * weights, "vector")]


def prefill(layer: Layer, tokens: int, variant: Variant) -> list[Launch]:
    """Dispatch, and grouped GEMMs over tiles of pairs; ``variants.down_cost`` for any device.

    With P = T K pairs and U experts in use, gate and up gather ``P D`` values, read ``2 U N D`` and
    store P N. "pairs" reads ``P N + U N D``, stores P D by slot, reads them again and sums.
    "dense" fills (T, R) with zeros and multiplies all R = E N neurons in one GEMM.
    """
    hidden, experts, width = layer.hidden_size, layer.num_experts, layer.width
    pairs, weights = tokens * layer.mean_experts, layer.union(tokens) * width * hidden
    rows = tile_rows(tokens * math.ceil(layer.mean_experts), experts, SIZE)
    products = experts * expected_tiles(tokens, layer.share, rows) * rows * width * hidden
    gathered = SIZE * (pairs * hidden + 2 * weights + pairs * width)
    launches = [Launch("dispatch", 16 * pairs)] * DISPATCH_LAUNCHES
    launches.append(Launch("routed gate, up", gathered, 4 * products, "routed"))
    if variant == "dense":
        zeros = Launch("zeros", SIZE * tokens * experts * width)
        return [*launches, zeros, gemm("dense down", tokens, experts * width, hidden)]
    stored = SIZE * (pairs * width + weights + pairs * hidden)
    down = Launch("routed down", stored, 2 * products, "routed")
    return [*launches, down, Launch("sum of slots", SIZE * (pairs + tokens) * hidden)]


@dataclass(frozen=True)
class Shape:
    """A dense model by its public configuration: D, F, layers, heads, heads of keys, words."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_size: int = 128

    def layer(self, sparsity: float, slices: int) -> Layer:
        """An FFN of equal slices, about a quarter of the active ones shared, or a ValueError."""
        width, rest = divmod(self.intermediate_size, slices)
        if rest:
            raise ValueError(f"{self.intermediate_size} neurons do not divide into {slices} slices")
        active = (1 - sparsity) * slices
        shared = round(active / 4)
        return Layer(self.hidden_size, shared * width, slices - shared, width, active - shared)

    def rest(self, tokens: int) -> Launch:
        """Return the least FLOPs and bytes of a layer's attention and of its part of the head.

        A prompt attends to half of itself on average, and only its last token has logits.
        """
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        weights = 2 * self.hidden_size * (queries + keys)
        head = self.hidden_size * self.vocabulary / self.num_layers
        context, cached, rows = (tokens / 2, tokens, 1)
        if tokens <= MAX_BATCH:
            context, cached, rows = CONTEXT, tokens * CONTEXT, tokens
        flops = 2 * tokens * (weights + 2 * context * queries) + 2 * rows * head
        return Launch("rest", SIZE * (weights + head + 2 * cached * keys), flops)


SHAPES = {
    "Llama-2-7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, 128256),
    "Qwen2.5-7B": Shape(3584, 18944, 28, 28, 4, 152064),
    "Qwen2.5-72B": Shape(8192, 29568, 80, 64, 8, 152064),
}


@dataclass(frozen=True)
class RooflineRow:
    """A prediction for one FFN of ``experts`` slices: ``speedup`` = dense_us / moe_us.

    ``bound`` is the same for what cannot be avoided, at full rates; ``end_to_end_bound`` adds
    attention and head. ``share`` = speedup / bound. ``variant`` says which kernels run.
    """

    model: str
    sparsity: float
    experts: int
    tokens: int
    variant: str
    dense_us: float
    moe_us: float
    speedup: float
    bound: float
    share: float
    end_to_end_bound: float


def roofline_rows(
    device: str,
    shapes: Sequence[str] | None = None,
    tokens: Sequence[int] = (1, 4, 16, 128, 512, 2048),
    sparsities: Sequence[float] = (0.25, 0.5),
    num_experts: Sequence[int] = (8, 64),
) -> list[RooflineRow]:
    """Predictions for every combination, to be printed with ``NOTE``.

    Args:
        device: a name in ``DEVICES``.
        shapes: names in ``SHAPES``; None: all.
        tokens, sparsities: T, and shares of the neurons that a token skips.
        num_experts: slices of the FFN, the shared ones included.

    Raises:
        ValueError: a name is not known, or a layer is not possible.
    """
    names = tuple(SHAPES) if shapes is None else shapes
    for asked, known in (([device], list(DEVICES)), (names, list(SHAPES))):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    rows, chosen = [], DEVICES[device]
    for name, sparsity, slices, count in product(names, sparsities, num_experts, tokens):
        shape, layer = SHAPES[name], SHAPES[name].layer(sparsity, slices)
        dense = chosen.seconds(dense_launches(count, shape.hidden_size, shape.intermediate_size))
        moe = chosen.seconds(moe_launches(layer, count))
        least_launches = (*layer.least(count), shape.rest(count))
        least_dense, least_moe, rest = (chosen.ideal.seconds([each]) for each in least_launches)
        bound, end_to_end = least_dense / least_moe, (rest + least_dense) / (rest + least_moe)
        times = (1e6 * dense, 1e6 * moe, dense / moe, bound, dense / moe / bound, end_to_end)
        rows.append(RooflineRow(name, sparsity, slices, count, layer.variant(count), *times))
    return rows
