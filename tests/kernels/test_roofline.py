"""The roofline model by hand, its properties, and the figures that it has to reproduce."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from weaver.artifacts.types import Router
from weaver.kernels import roofline
from weaver.kernels.gpu.configurations import DECODE_TOKENS
from weaver.kernels.gpu.dispatch import dispatch_pairs
from weaver.kernels.gpu.variants import PrefillShape, Variant, down_cost
from weaver.kernels.reference import ExpertChoice, route
from weaver.kernels.roofline import DEVICES, SHAPES, Launch, Layer, dense_launches, moe_launches

# 100 FLOP/s in matrix units, 50 outside, 10 bytes/s.
ROUND = roofline.Device(100.0, 50.0, 10.0, 1.0, gemm_share=0.5, routed_share=0.25, memory_share=0.5)
# D = 4, S = 2, E = 3 of N = 2, K = 1.
SMALL = Layer(4, 2, 3, 2, 1)


def by_name(launches: Sequence[Launch]) -> dict[str, Launch]:
    return {launch.name: launch for launch in launches}


def test_a_launch_lasts_as_long_as_the_slower_of_bytes_and_arithmetic() -> None:
    # 10 bytes at 5 bytes/s; 200 FLOPs at 50, 25 and 25 FLOP/s; 1 s for every launch.
    assert ROUND.seconds([Launch("bytes", 10.0, 50.0)]) == 1 + 2
    assert ROUND.seconds([Launch("gemm", 10.0, 200.0)]) == 1 + 4
    assert ROUND.seconds([Launch("routed", 10.0, 200.0, "routed")]) == 1 + 8
    assert ROUND.seconds([Launch("vector", 10.0, 200.0, "vector")]) == 1 + 8
    assert ROUND.seconds([Launch("bytes", 10.0)] * 3) == 3 * (1 + 2)
    assert ROUND.ideal.seconds([Launch("bytes", 10.0), Launch("gemm", 0.0, 200.0)]) == 1 + 2
    assert ROUND.ideal.seconds([Launch("routed", 0.0, 200.0, "routed")]) == 2
    assert ROUND.ideal.seconds([Launch("vector", 0.0, 200.0, "vector")]) == 4


def test_tiles_by_hand() -> None:
    # n is 0, 1 or 2 with probabilities 1/4, 1/2, 1/4.
    assert roofline.expected_tiles(2, 0.5, 1) == pytest.approx(1)
    assert roofline.expected_tiles(2, 0.5, 2) == pytest.approx(0.75)
    assert roofline.expected_tiles(33, 1.0, 16) == 3
    assert roofline.expected_tiles(32, 1.0, 16) == 2


@given(st.integers(1, 300), st.floats(0.01, 1.0), st.sampled_from((1, 16, 64, 128)))
def test_tiles_hold_all_rows_and_at_most_one_of_them_is_partial(
    tokens: int, share: float, rows: int
) -> None:
    tiles = roofline.expected_tiles(tokens, share, rows)
    assert tokens * share / rows <= tiles * (1 + 1e-9)
    assert tiles <= (tokens * share / rows + 1) * (1 + 1e-9)


def test_a_product_fills_the_rows_of_its_tiles() -> None:
    # 3 tokens become 16 rows; 130 become 2 tiles of 128. Two bytes a value.
    assert roofline.gemm("a", 3, 4, 5) == Launch("a", 2 * (12 + 20 + 15), 2 * 16 * 4 * 5)
    assert roofline.gemm("a", 130, 4, 5) == Launch("a", 2 * (520 + 20 + 650), 2 * 256 * 4 * 5)


def test_dense_by_hand() -> None:
    """T = 16, D = 4, F = 8: T D = 64, D F = 32, T F = 128."""
    gate, up, activation, down = dense_launches(16, 4, 8)
    assert (gate.moved, gate.flops) == (2 * (64 + 32 + 128), 2 * 16 * 32)
    assert (up.moved, up.flops) == (down.moved, down.flops) == (gate.moved, gate.flops)
    assert (activation.moved, activation.flops) == (2 * 3 * 128, 0)
    # 448 bytes at 5 bytes/s are slower than 1024 FLOPs at 50 FLOP/s.
    assert ROUND.seconds([gate, up, activation, down]) == pytest.approx(4 + 3 * 89.6 + 153.6)


def test_decode_by_hand() -> None:
    """2 tokens use 3 (1 - (2/3)^2) = 5/3 experts; one matrix of an expert has 8 weights."""
    assert SMALL.union(2) == pytest.approx(5 / 3)
    assert SMALL.variant(2) == "decode"
    launches = by_name(moe_launches(SMALL, 2))
    hidden, down = launches["decode gate, up"], launches["decode down"]
    # T D = 8 inputs or outputs of 2 bytes, P N = 4 neurons in float32.
    assert hidden.moved == pytest.approx(2 * 8 + 2 * 2 * 8 * 5 / 3 + 4 * 4)
    assert down.moved == pytest.approx(2 * 8 + 2 * 8 * 5 / 3 + 4 * 4)
    assert (hidden.flops, down.flops) == (2 * 2 * 2 * 8, 2 * 2 * 8)
    assert hidden.unit == down.unit == "vector"


def test_router_and_shared_expert_by_hand() -> None:
    launches = moe_launches(SMALL, 2)
    named = by_name(launches)
    assert named["selection"].moved == 2 * 4 * 6
    # Inputs as float32; T D + E D + T E float32 values; 2 T E D FLOPs.
    assert named["cast"].moved == 2 * 8 + 4 * 8
    assert (named["router"].moved, named["router"].flops) == (4 * (8 + 12 + 6), 2 * 24)
    assert launches[-7:-3] == dense_launches(2, 4, 2)
    assert named["sum of parts"].moved == 2 * 3 * 8
    assert len(launches) == 2 + roofline.ROUTING_LAUNCHES + 4 + 2 + 1
    without = moe_launches(replace(SMALL, num_shared=0), 2)
    assert len(launches) - len(without) == 4


def test_prefill_by_hand() -> None:
    """T = 32, K = E = 2 experts of N = 8: 64 pairs, each expert with 32 rows of a tile of 64."""
    layer = Layer(4, 0, 2, 8, 2)
    launches = roofline.prefill(layer, 32, "pairs")
    assert launches[: roofline.DISPATCH_LAUNCHES] == [Launch("dispatch", 2 * 8 * 64)] * 16
    # P D = 256, U N D = 64, P N = 512; 128 rows of tiles.
    gate_up, down, added = launches[roofline.DISPATCH_LAUNCHES :]
    assert (gate_up.moved, gate_up.flops) == (2 * (256 + 2 * 64 + 512), 4 * 128 * 32)
    assert (down.moved, down.flops) == (2 * (512 + 64 + 256), 2 * 128 * 32)
    assert gate_up.unit == down.unit == "routed"
    assert added.moved == 2 * (256 + 128)
    zeros = Launch("zeros", 2 * 32 * 16)
    dense = roofline.prefill(layer, 32, "dense")
    assert dense[16:] == [gate_up, zeros, roofline.gemm("dense down", 32, 16, 4)]


def test_what_cannot_be_avoided_by_hand() -> None:
    """2 tokens, F = 8 neurons of 3 D = 12 weights; A = 4, R = 2 + 2 * 5/3, 3 rows of the router."""
    dense, moe = SMALL.least(2)
    assert (dense.moved, dense.flops) == (2 * (96 + 2 * 8), 2 * 2 * 96)
    assert moe.moved == pytest.approx(2 * (12 * 16 / 3 + 3 * 4 + 2 * 8))
    assert moe.flops == 2 * 2 * (12 * 4 + 3 * 4)


@pytest.mark.parametrize("variant", ["pairs", "dense"])
@pytest.mark.parametrize(("experts", "width", "top_k"), [(8, 1792, 6), (64, 224, 48)])
def test_the_down_projection_costs_what_the_choice_of_variants_assumes(
    variant: Variant, experts: int, width: int, top_k: int
) -> None:
    """At full rates of the H100, whose ratio is in ``MACS_PER_BYTE``; partial tiles cost more."""
    tokens = 2**15
    device = DEVICES["h100"].ideal
    named = ("zeros", "dense down", "routed down", "sum of slots")
    launches = roofline.prefill(Layer(4096, 0, experts, width, top_k), tokens, variant)
    seconds = device.seconds([each for each in launches if each.name in named])
    expected = down_cost(PrefillShape(tokens, 4096, experts, width, top_k, 2), variant)
    assert seconds * device.bandwidth == pytest.approx(expected, rel=0.02)
    assert seconds * device.bandwidth > 0.99 * expected


layers = st.builds(
    Layer,
    hidden_size=st.sampled_from((64, 1024, 4096)),
    num_shared=st.integers(0, 8000),
    num_experts=st.integers(16, 64),
    width=st.integers(1, 2000),
    mean_experts=st.integers(1, 16),
)


@given(layers, st.integers(1, 400), st.sampled_from(sorted(DEVICES)))
def test_a_faster_device_is_never_slower_and_none_beats_the_least(
    layer: Layer, tokens: int, name: str
) -> None:
    device, launches = DEVICES[name], moe_launches(layer, tokens)
    neurons = layer.num_shared + layer.num_experts * layer.width
    dense_least, least = (device.ideal.seconds([each]) for each in layer.least(tokens))
    dense = device.ideal.seconds(dense_launches(tokens, layer.hidden_size, neurons))
    assert dense_least <= dense
    assert least <= device.ideal.seconds(launches)
    seconds = device.seconds(launches)
    for field in ("matrix_flops", "vector_flops", "bandwidth", "gemm_share", "memory_share"):
        faster = replace(device, **{field: 1.3 * getattr(device, field)})
        assert faster.seconds(launches) <= seconds
    assert device.ideal.seconds(launches) <= seconds
    assert replace(device, launch_seconds=1e-5).seconds(launches) > seconds


@given(layers, st.integers(1, 400))
def test_more_tokens_use_more_experts_and_cost_more(layer: Layer, tokens: int) -> None:
    union = [layer.union(count) for count in (1, tokens, tokens + 1)]
    assert union[0] == pytest.approx(layer.mean_experts)
    assert union == sorted(union)
    assert union[-1] <= layer.num_experts
    few, more = (layer.least(count) for count in (tokens, tokens + 1))
    for first, second in zip(few, more, strict=True):
        assert first.moved < second.moved
        assert first.flops < second.flops


class Operations(TorchDispatchMode):
    """Collects the names of operations that do something on a device."""

    VIEWS = ("view", "slice", "expand", "unsqueeze", "t")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_launches_of_routing_and_dispatch_are_those_of_the_code() -> None:
    x_TD = torch.ones(64, 8, dtype=torch.bfloat16)
    values_E = torch.zeros(6, dtype=torch.bfloat16)
    weight_ED = torch.ones(6, 8, dtype=torch.bfloat16)
    router = Router("linear", weight_ED, values_E, values_E, bias_E=values_E)
    with Operations() as routing:
        ids_TK, _ = route(x_TD, router, "silu", ExpertChoice(4)).slots()
    # The model has the product and the cast of the inputs as launches of their own.
    assert routing.names.count("addmm") == 1
    assert len(routing.names) == 2 + roofline.ROUTING_LAUNCHES
    with Operations() as dispatching:
        dispatch_pairs(ids_TK, 6, 16)
    assert len(dispatching.names) == roofline.DISPATCH_LAUNCHES


def test_decode_ends_where_the_kernels_end_it() -> None:
    assert SMALL.variant(DECODE_TOKENS) == "decode" != SMALL.variant(DECODE_TOKENS + 1)


@pytest.mark.slow
def test_triton_is_not_needed() -> None:
    code = "import sys; sys.modules['triton'] = None; import weaver.kernels.roofline"
    subprocess.run([sys.executable, "-c", code], check=True)


# Llama-3-8B's FFN in 100 parts, 32 of them shared: sizes that both rates of break-even fit.
def third(sparsity: float) -> Layer:
    return Layer(4096, 32 * 143, 68, 143, round(100 * (1 - sparsity)) - 32)


@pytest.mark.parametrize(
    ("sparsity", "bounds"),
    [(0.25, (1.34, 1.11, 1.01, 1.00, 1.00)), (0.5, (1.99, 1.58, 1.25, 1.06, 1.00))],
)
def test_decode_bounds_at_batches_of_1_to_16(sparsity: float, bounds: Sequence[float]) -> None:
    """The figures that the kernels were designed by; their layouts are not known."""
    device = DEVICES["h100"].ideal
    for tokens, bound in zip((1, 2, 4, 8, 16), bounds, strict=True):
        dense, moe = (device.seconds([each]) for each in third(sparsity).least(tokens))
        assert dense / moe == pytest.approx(bound, abs=0.011)


@pytest.mark.parametrize(("sparsity", "rate"), [(0.25, 0.63), (0.5, 0.27)])
def test_rate_at_which_routed_products_break_even(sparsity: float, rate: float) -> None:
    layer = third(sparsity)
    assert layer.share == pytest.approx(rate, abs=0.006)
    # Computing is all that costs; full tiles.
    device = roofline.Device(1.0, 1e9, 1e9, 0.0, routed_share=0.7 * layer.share)
    tokens = 2**20
    dense = device.seconds(dense_launches(tokens, 4096, 14300))
    moe = moe_launches(layer, tokens)
    routed = [each for each in roofline.prefill(layer, tokens, "pairs") if each.unit == "routed"]
    shared = [each for each in moe if each.name in ("gate", "up", "down")]
    assert dense / device.seconds([*routed, *shared]) == pytest.approx(1.0, abs=0.01)


def test_bound_of_whole_models_at_batch_1() -> None:
    rows = roofline.roofline_rows("h100", ["Llama-2-7B", "Llama-3-8B"], [1], num_experts=[8])
    assert [f"{row.end_to_end_bound:.2f}" for row in rows] == ["1.19", "1.47", "1.23", "1.60"]


@pytest.mark.parametrize(
    ("experts", "top_k", "shared", "variant", "speedup"),
    [(64, 48, 0, "pairs", 0.83), (64, 48, 0, "dense", 1.20), (6, 4, 2, "pairs", 1.28)],
)
def test_prefill_at_full_rates(
    experts: int, top_k: int, shared: int, variant: Variant, speedup: float
) -> None:
    """The figures leave out partial tiles, dispatch and zeros, which cost up to 8%."""
    device, width = DEVICES["h100"].ideal, 14336 // (experts + shared)
    layer = Layer(4096, shared * width, experts, width, top_k)
    launches = roofline.prefill(layer, 2048, variant) + dense_launches(2048, 4096, shared * width)
    dense, _ = layer.least(2048)
    assert 0.91 * speedup < device.seconds([dense]) / device.seconds(launches) <= speedup


def test_attention_and_head_by_hand() -> None:
    """D = 4, 2 layers, queries of 4 and keys of 2, 6 words: 48 weights and half a head of 24."""
    shape = roofline.Shape(4, 8, 2, 2, 1, 6, head_size=2)
    step = shape.rest(3)
    assert step.moved == 2 * (48 + 12 + 3 * 512 * 2 * 2)
    assert step.flops == 2 * 3 * 48 + 4 * 3 * 512 * 4 + 2 * 3 * 12
    prompt = shape.rest(100)
    assert prompt.moved == 2 * (48 + 12 + 100 * 2 * 2)
    assert prompt.flops == 2 * 100 * 48 + 4 * 100 * 50 * 4 + 2 * 12


def test_shapes_have_the_parameters_of_their_models() -> None:
    billions = []
    for shape in SHAPES.values():
        heads = 2 * shape.head_size * (shape.heads + shape.kv_heads)
        layer = shape.hidden_size * (heads + 3 * shape.intermediate_size)
        words = 2 * shape.vocabulary * shape.hidden_size
        billions.append(1e-9 * (shape.num_layers * layer + words))
    assert billions == pytest.approx([6.738, 8.030, 7.616, 72.71], rel=1e-3)


def test_layers_of_slices() -> None:
    llama = SHAPES["Llama-3-8B"]
    assert llama.layer(0.25, 8) == Layer(4096, 2 * 1792, 6, 1792, 4)
    assert llama.layer(0.5, 8) == Layer(4096, 1792, 7, 1792, 3)
    assert llama.layer(0.25, 64) == Layer(4096, 12 * 224, 52, 224, 36)
    with pytest.raises(ValueError, match="14336 neurons do not divide into 60 slices"):
        llama.layer(0.25, 60)
    with pytest.raises(ValueError, match="0 of 8 experts"):
        llama.layer(1.0, 8)
    with pytest.raises(ValueError, match="9 of 8 experts"):
        Layer(4, 0, 8, 2, 9)


def test_rows() -> None:
    rows = roofline.roofline_rows("a100", ["Llama-2-7B"], [1, 2048], [0.25, 0.5], [8])
    assert [(row.sparsity, row.tokens) for row in rows] == list(product((0.25, 0.5), (1, 2048)))
    assert [row.variant for row in rows] == ["decode", "pairs"] * 2
    for row in rows:
        assert row.speedup == pytest.approx(row.dense_us / row.moe_us)
        assert row.share == pytest.approx(row.speedup / row.bound)
        assert 1 < row.end_to_end_bound < row.bound <= 1 / (1 - row.sparsity)
    device, layer = DEVICES["a100"], SHAPES["Llama-2-7B"].layer(0.25, 8)
    dense = device.seconds(dense_launches(1, 4096, 11008))
    assert rows[0].dense_us == pytest.approx(1e6 * dense)
    assert rows[0].moe_us == pytest.approx(1e6 * device.seconds(moe_launches(layer, 1)))
    assert len(roofline.roofline_rows("a100", None, [1], [0.5], [8])) == len(SHAPES)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'v100' is none of a100, h100, h200, b200, rtx3090"):
        roofline.roofline_rows("v100")
    with pytest.raises(ValueError, match="'GPT-2' is none of Llama-2-7B, Llama-3-8B"):
        roofline.roofline_rows("h100", ["GPT-2"])
