"""Speed and exactness of one converted FFN next to the dense one it came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.bench_results import BenchRow, FfnLevel
from weaver.artifacts.types import ExpertLayout, Router
from weaver.evaluation.baselines import Forward, dense_variants, transformers_forward
from weaver.evaluation.speed import bench_row
from weaver.kernels.ops import moe_forward
from weaver.kernels.reference import Routing, masked_forward
from weaver.kernels.timing import Timing, interleave
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward

# Up to so many tokens an FFN is bound by what it reads, above by what it computes.
FEW_TOKENS = 4
# Weights that the copies of a layer have together: more than the caches of a processor hold.
STACK_BYTES = 2**27
# Tokens whose outputs are compared with float64.
COMPARED = 64
# Rows of matrices that torch's grouped_mm takes are multiples of so many bytes.
GROUPED_MM_BYTES = 16


@dataclass(frozen=True)
class LayerCase:
    """A dense FFN, its conversion, and inputs.

    Args:
        dense: the dense FFN.
        module: the converted one, with experts, in the same dtype.
        x_TD: inputs of both; a measurement at T tokens takes the first T.
    """

    dense: GluWeights
    module: MoEFeedForward
    x_TD: Tensor

    @cached_property
    def variants(self) -> dict[str, Forward]:
        return dense_variants(self.dense)

    @property
    def weight_bytes(self) -> int:
        """Size of the dense FFN's matrices."""
        return 3 * self.dense.gate_FD.nbytes

    def copy(self) -> LayerCase:
        """The same in other memory."""
        # Not deepcopy(self): the cached functions would go on reading this one's weights.
        return LayerCase(deepcopy(self.dense), deepcopy(self.module), self.x_TD.clone())

    @cached_property
    def transformers(self) -> Callable[[Tensor, Routing], Tensor]:
        module = self.module
        return transformers_forward(module.layer(), module.num_routed_experts, "grouped_mm")


def synthetic_case(
    shape: LayerShape,
    hidden_size: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    skewed: bool = False,
    seed: int = 0,
    dense_neurons: int | None = None,
) -> LayerCase:
    """Random weights and standard normal inputs, outputs of about unit size, and a linear router.

    Its scores are standard normal, so that tokens spread nearly evenly over the experts. ``skewed``
    adds ``-log(e + 1)`` to the scores, Zipf's law for the preferences. Exactly K experts are
    selected; biases, constants and glu routers are left out. The dense FFN has as many neurons as
    the converted one stores, or ``dense_neurons`` where experts overlap.
    """
    generator = torch.Generator().manual_seed(seed)
    neurons, experts = shape.total_neurons, shape.n_routed_experts
    shared = shape.num_shared_neurons
    layout = ExpertLayout(
        intermediate_size=neurons,
        top_k=shape.num_experts_per_tok,
        shared_S=torch.arange(shared),
        experts_EN=torch.arange(shared, neurons).view(experts, -1),
    )

    def normal(rows: int, scale: float) -> Tensor:
        return (scale * torch.randn(rows, hidden_size, generator=generator)).to(dtype)

    stored = GluWeights(
        gate_FD=normal(neurons, 2 * hidden_size**-0.5),
        up_FD=normal(neurons, hidden_size**-0.5),
        down_FD=normal(neurons, neurons**-0.5),
        activation="silu",
    )
    router = Router(
        kind="linear",
        weight_ED=normal(experts, hidden_size**-0.5),
        scale_E=torch.zeros(experts),
        balance_bias_E=torch.zeros(experts),
        bias_E=-torch.arange(1.0, experts + 1).log() if skewed else None,
    )
    dense = stored if dense_neurons is None else stored.select(torch.arange(dense_neurons))
    return LayerCase(dense, MoEFeedForward.convert(stored, layout, router), normal(tokens, 1.0))


@torch.inference_mode()
def measure_layer(
    case: LayerCase,
    tokens: int,
    level: FfnLevel,
    *,
    repeats: int,
    warmup: int,
    seconds: float = math.inf,
) -> BenchRow:
    """Time the dense FFN, the converted one, and the converted one with transformers' experts.

    A timed run computes copies of the layer one after the other, as many as have ``STACK_BYTES``
    of weights, so that they are read from memory as those of a whole model are; times are of one.

    Args:
        case: the layer; a threshold has no counterpart in transformers, and experts whose rows do
            not fill 16 bytes have none that runs.
        tokens: T.
        level: with the router ("layer"), or with the routing given ("kernel").
        repeats: timed rounds.
        warmup: rounds not counted.
        seconds: budget, after which no round begins; one is always timed.
    """
    module, x_TD = case.module, case.x_TD[:tokens]
    routing = module.routing(x_TD)
    assert routing is not None, "a static layer has no experts to time"
    timings = _stack_timings(
        *(case, x_TD, routing, level), repeats=repeats, warmup=warmup, seconds=seconds
    )
    variant = min(case.variants, key=lambda name: timings[name].median)
    return bench_row(
        timings[variant],
        timings["moe"],
        phase="decode" if tokens == 1 else "prefill",
        tokens=tokens,
        bound=speed_bound(case.dense, module.shape, routing),
        dense_variant=variant,
        path=module.path(x_TD, routing),
        routing_ms=1e3 * timings["routing"].median,
        grouped_mm_ms=1e3 * timings["grouped_mm"].median if "grouped_mm" in timings else None,
        relative_error=relative_error(case, routing, module(x_TD)),
    )


def _stack_timings(
    case: LayerCase,
    x_TD: Tensor,
    routing: Routing,
    level: FfnLevel,
    *,
    repeats: int,
    warmup: int,
    seconds: float,
) -> dict[str, Timing]:
    """Seconds of one layer, by what computed it."""
    count = max(1, -(-STACK_BYTES // case.weight_bytes))
    stack = [case, *(case.copy() for _ in range(count - 1))]
    calls = [_calls(each, x_TD, routing, level) for each in stack]

    def run(name: str) -> None:
        for each in calls:
            each[name]()

    functions = {name: partial(run, name) for name in calls[0]}
    timings = interleave(functions, repeats=repeats, warmup=warmup, seconds=seconds)
    return {
        name: Timing(tuple(seconds / count for seconds in timing.seconds))
        for name, timing in timings.items()
    }


def _calls(
    case: LayerCase, x_TD: Tensor, routing: Routing, level: FfnLevel
) -> dict[str, Callable[[], object]]:
    module = case.module
    calls: dict[str, Callable[[], object]] = {
        name: partial(forward, x_TD) for name, forward in case.variants.items()
    }
    given = partial(moe_forward, x_TD, module.layer(), routing)
    calls["moe"] = given if level == "kernel" else partial(module, x_TD)
    calls["routing"] = partial(module.routing, x_TD)
    rows = (x_TD.shape[1], module.shape.moe_intermediate_size)
    fits = all(size * x_TD.element_size() % GROUPED_MM_BYTES == 0 for size in rows)
    if routing.top_k is not None and fits:
        calls["grouped_mm"] = partial(_grouped_mm, case, x_TD, routing, level)
    return calls


def speed_bound(dense: GluWeights, shape: LayerShape, routing: Routing) -> float:
    """Ceiling of the speed-up of one FFN.

    Above ``FEW_TOKENS`` dense FLOPs over converted ones at the routing's mean number of experts. Up
    to it dense weights over those that any token reads, ``3 F / (3 (S + U N) + r)`` for U experts
    in use and r rows of the router.
    """
    full = LayerShape(dense.intermediate_size)
    if routing.num_tokens > FEW_TOKENS:
        mean = routing.num_pairs / routing.num_tokens
        return full.flops(dense.hidden_size) / shape.flops(dense.hidden_size, mean)
    used = int((routing.counts_E() > 0).sum())
    read = shape.num_shared_neurons + used * shape.moe_intermediate_size
    return 3 * dense.intermediate_size / (3 * read + shape.router_rows)


def relative_error(case: LayerCase, routing: Routing, y_TD: Tensor) -> float:
    """``|y - y64| / |y64|`` on the first ``COMPARED`` tokens, the routing taken as it is."""
    first = routing.tokens_P < COMPARED
    compared = min(COMPARED, routing.num_tokens)
    some = Routing(
        routing.tokens_P[first],
        routing.experts_P[first],
        routing.weights_P[first].double(),
        compared,
        routing.num_experts,
    )
    exact = case.module.layer().to(torch.float64)
    truth_TD = masked_forward(case.x_TD[:compared].double(), exact, some)
    error = (y_TD[:compared].double() - truth_TD).norm() / truth_TD.norm()
    return float(error)


def _grouped_mm(case: LayerCase, x_TD: Tensor, routing: Routing, level: FfnLevel) -> Tensor:
    chosen = case.module.routing(x_TD) if level == "layer" else routing
    assert chosen is not None
    return case.transformers(x_TD, chosen)
