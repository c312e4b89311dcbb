"""Parameters and FLOPs: hand-worked numbers, and the counts of real models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_conversions import (
    OpenTiny,
    account_of,
    load_converted,
    random_conversions,
    random_layout,
    random_router,
    write_converted,
)
from tiny_models import TINY

from weaver.artifacts.types import ROUTER_KINDS, Compensation, Router, RouterKind
from weaver.models.accounting import DenseFfnSize, LayerShape, ModelAccount

# D = 4: S = 2 shared neurons, E = 3 experts of N = 5, K = 1.
SHAPE = LayerShape(2, 3, 5, 1, "linear")


def test_a_layer_by_hand() -> None:
    assert SHAPE.total_neurons == 2 + 3 * 5
    assert SHAPE.active_neurons == 2 + 1 * 5
    # 17 neurons of 3 * 4 weights; the router: 3 rows of 4 and 3 scales.
    assert SHAPE.parameters(4, active=False) == 17 * 12 + 12 + 3
    assert SHAPE.parameters(4, active=True) == 7 * 12 + 12 + 3
    # 2 FLOPs for each of the 7 * 12 weights and the 12 of the router.
    assert SHAPE.flops(4) == 2 * (7 * 12 + 12)


def test_biases_and_the_glu_router_by_hand() -> None:
    shape = LayerShape(2, 3, 5, 1, "glu", gate_bias=True, up_bias=True, output_bias=True)
    # Two biases a neuron, one of the output (4), two router matrices of 12, 3 scales.
    assert shape.parameters(4, active=False) == 17 * 14 + 4 + 24 + 3
    assert shape.parameters(4, active=True) == 7 * 14 + 4 + 24 + 3
    assert shape.flops(4) == 2 * (7 * 12 + 24)


def test_the_intercept_and_the_constants_by_hand() -> None:
    shape = LayerShape(2, 3, 5, 2, "linear", router_bias=True, expert_bias=True)
    # Constants of 3 or 2 experts, the router's matrix of 12, 3 scales and 3 intercepts.
    assert shape.parameters(4, active=False) == 17 * 12 + 3 * 4 + 12 + 6
    assert shape.parameters(4, active=True) == 12 * 12 + 2 * 4 + 12 + 6
    # Two constants of 4 values are added, one FLOP each.
    assert shape.flops(4) == 2 * (12 * 12 + 12) + 8


def test_a_shape_written_before_there_were_constants() -> None:
    later = {"router_bias", "expert_bias", "selection", "weighting", "routed_scaling"}
    later |= {"threshold_slope", "early_experts", "late_experts"}
    entry = {k: v for k, v in SHAPE.to_dict().items() if k not in later}
    assert len(entry) == 8
    assert LayerShape(**entry) == SHAPE


def test_the_mean_of_a_threshold_by_hand() -> None:
    """A threshold set to one expert costs what top-1 does; what a text used is counted apart."""
    shape = replace(SHAPE, selection="threshold", expert_bias=True)
    same = replace(SHAPE, expert_bias=True)
    assert shape.active_neurons == same.active_neurons == 7
    assert shape.flops(4) == same.flops(4) == 2 * (7 * 12 + 12) + 4
    assert shape.parameters(4, active=True) == same.parameters(4, active=True)
    # 1.3 experts: 2 + 6.5 neurons and 1.3 constants of 4 values, 2 * (8.5 * 12 + 12) + 5.2 = 233.2.
    assert shape.flops(4, 1.3) == 233
    assert shape.flops(4, 0.0) == 2 * (2 * 12 + 12)
    account = ModelAccount(4, 17, 1000, [shape, LayerShape(8), SHAPE])
    measured = account.measured_ffn_flops({0: 1.3, 2: 1.0})
    assert measured == 233 + 2 * 96 + 2 * (7 * 12 + 12)
    assert account.ffn_flops == 2 * (7 * 12 + 12) + 4 + 2 * 96 + 2 * (7 * 12 + 12)
    with pytest.raises(KeyError, match="2"):
        account.measured_ffn_flops({0: 1.3})


def test_a_static_layer_by_hand() -> None:
    shape = LayerShape(6, output_bias=True)
    assert shape.parameters(4, active=True) == shape.parameters(4, active=False) == 6 * 12 + 4
    assert shape.flops(4) == 2 * 6 * 12


def test_a_model_by_hand() -> None:
    """Two layers of F = 17 in a model of 1000 parameters: 2 * 17 * 12 = 408 are in the FFNs."""
    account = ModelAccount(4, 17, 1000, [SHAPE, LayerShape(8)])
    assert account.total_parameters == 1000 - 408 + (204 + 15) + 96
    assert account.active_parameters == 1000 - 408 + (84 + 15) + 96
    assert account.dense_ffn_flops == 2 * 408
    assert account.ffn_flops == 2 * (84 + 12) + 2 * 96
    assert account.ffn_sparsity == pytest.approx(1 - 15 / 34)
    assert account.speed_bound == pytest.approx(1000 / 787)


def test_the_biases_of_the_dense_ffn_by_hand() -> None:
    account = ModelAccount(
        4, 17, 1000, [LayerShape(8, output_bias=True)], True, False, dense_output_bias=True
    )
    # The dense layer has 17 * (12 + 1) + 4 = 225 parameters, the static one 8 * 12 + 4 = 100.
    assert account.total_parameters == account.active_parameters == 1000 - 225 + 100


def test_a_conversion_of_everything_costs_its_routers_only() -> None:
    account = ModelAccount(4, 17, 1000, [LayerShape(2, 3, 5, 3, "linear")] * 2)
    assert account.total_parameters == account.active_parameters == 1000 + 2 * 15
    assert account.ffn_sparsity == 0
    assert account.ffn_flops - account.dense_ffn_flops == 2 * 2 * 12
    assert account.speed_bound < 1


def test_the_shape_of_a_layout() -> None:
    layout = random_layout(48, shared=8, experts=5, top_k=2)
    shape = LayerShape.of(
        layout, random_router("glu", 5, 4), gate_bias=True, up_bias=False, output_bias=True
    )
    assert shape == LayerShape(8, 5, 8, 2, "glu", True, False, True)
    assert LayerShape(**shape.to_dict()) == shape
    chosen = random_layout(48, shared=8, experts=5, top_k=2, selection="threshold")
    assert LayerShape.of(
        chosen, random_router("linear", 5, 4), gate_bias=False, up_bias=False, output_bias=False
    ) == LayerShape(8, 5, 8, 2, "linear", selection="threshold")
    weights: dict[str, Any] = {"weighting": "softmax", "routed_scaling": 2.0}
    weighted = random_layout(48, shared=8, experts=5, top_k=2, **weights)
    biases: dict[str, Any] = {"gate_bias": False, "up_bias": False, "output_bias": False}
    found = LayerShape.of(weighted, random_router("linear", 5, 4, **weights), **biases)
    assert found == LayerShape(8, 5, 8, 2, "linear", weighting="softmax", routed_scaling=2.0)
    with pytest.raises(
        ValueError, match=r"weighting is \('softmax', 2\.0\), the router's \('unit'"
    ):
        LayerShape.of(weighted, random_router("linear", 5, 4), **biases)
    static = random_layout(48, shared=8, experts=0, top_k=0)
    assert LayerShape.of(
        static, None, gate_bias=False, up_bias=False, output_bias=False
    ) == LayerShape(8)


def test_the_shape_of_a_compensated_layout() -> None:
    layout = random_layout(48, shared=8, experts=5, top_k=2)
    static = random_layout(48, shared=8, experts=0, top_k=0, output_bias_D=torch.ones(4))
    router = random_router("linear", 5, 4)
    plain = LayerShape(8, 5, 8, 2, "linear")
    cases: list[tuple[Router, Compensation | None, dict[str, Any]]] = [
        (router, Compensation(down_FD=torch.ones(48, 4)), {}),
        (router, Compensation(output_bias_D=torch.ones(4)), {"output_bias": True}),
        (router, Compensation(expert_bias_ED=torch.ones(5, 4)), {"expert_bias": True}),
        (replace(router, bias_E=torch.ones(5)), None, {"router_bias": True}),
    ]
    for each_router, compensation, changes in cases:
        found = LayerShape.of(
            layout,
            each_router,
            compensation,
            gate_bias=False,
            up_bias=False,
            output_bias=False,
        )
        assert found == replace(plain, **changes)
    assert LayerShape.of(
        static, None, gate_bias=False, up_bias=False, output_bias=False
    ) == LayerShape(8, output_bias=True)


@st.composite
def routed_shapes(draw: st.DrawFn) -> LayerShape:
    experts = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(ROUTER_KINDS))
    return LayerShape(
        num_shared_neurons=draw(st.integers(0, 30)),
        n_routed_experts=experts,
        moe_intermediate_size=draw(st.integers(1, 9)),
        num_experts_per_tok=draw(st.integers(1, experts)),
        router_kind=kind,
        gate_bias=draw(st.booleans()),
        up_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        router_bias=kind == "linear" and draw(st.booleans()),
        expert_bias=draw(st.booleans()),
    )


@given(routed_shapes())
def test_active_is_at_most_total(shape: LayerShape) -> None:
    active, total = shape.parameters(8, active=True), shape.parameters(8, active=False)
    assert active <= total
    assert (active == total) == (shape.num_experts_per_tok == shape.n_routed_experts)
    # Biases and scales are added, not multiplied.
    added = shape.active_neurons * (shape.gate_bias + shape.up_bias)
    added += 8 * shape.output_bias + shape.n_routed_experts * (1 + shape.router_bias)
    constants = 8 * shape.num_experts_per_tok * shape.expert_bias
    assert shape.flops(8) == 2 * (active - added - constants) + constants


@pytest.mark.parametrize("variant", TINY)
def test_the_parameters_of_the_real_model(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    checkpoint = open_tiny(variant)
    kind: RouterKind = "glu" if variant in {"mistral", "llama+bias"} else "linear"
    conversions = random_conversions(checkpoint, shared=8, experts=5, top_k=2, kind=kind)
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", conversions))
    account = account_of(checkpoint, conversions)
    assert account.total_parameters == sum(p.numel() for p in model.parameters())
    skipped = 3 * 3 * 8 * (3 * 32 + (2 if variant == "llama+bias" else 0))
    assert account.active_parameters == account.total_parameters - skipped
    assert account.ffn_sparsity == pytest.approx(1 - 24 / 48)


def test_the_parameters_of_a_real_static_model_with_a_bias(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    checkpoint = open_tiny("llama")
    layout = random_layout(48, shared=30, experts=0, top_k=0, output_bias_D=torch.ones(32))
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", [(layout, None)] * 3))
    account = account_of(checkpoint, [(layout, None)] * 3)
    assert account.total_parameters == sum(p.numel() for p in model.parameters())
    assert account.active_parameters == account.total_parameters


def test_experts_that_are_summed() -> None:
    shape = LayerShape(8, 5, 8, 2, "linear")
    assert shape.sums_experts
    assert not replace(shape, weighting="softmax", routed_scaling=2.0).sums_experts
    one = LayerShape(8, 5, 8, 1, "linear", weighting="softmax")
    assert one.sums_experts
    assert not replace(one, routed_scaling=2.0).sums_experts
    assert LayerShape(8).sums_experts


def test_experts_before_the_conversion_count_with_their_share_of_the_tokens() -> None:
    """A dense layer of 6 neurons, and two experts of 4 of which a token uses one: by hand, D = 2.

    A row is 3 * 2 parameters. The experts become 2 shared neurons and one of two routed ones,
    behind a router of 2 rows.
    """
    split = LayerShape(2, 2, 1, 1, "linear")
    account = ModelAccount(
        2,
        6,
        1000,
        [LayerShape(6), split, split],
        sites=[DenseFfnSize(LayerShape(6)), *[DenseFfnSize(LayerShape(4), 0.5)] * 2],
        outer_flops=8,
    )
    router = 2 * 2 + 2
    outside = 1000 - 6 * (6 + 4 + 4)
    assert account.total_parameters == 1000 + 2 * router
    assert account.dense_active_parameters == outside + 6 * (6 + 4)
    assert account.active_parameters == outside + 6 * (6 + 3) + router
    assert account.dense_ffn_flops == 8 + 12 * (6 + 4)
    assert account.ffn_flops == 8 + 12 * (6 + 3) + 4 * 2
    assert account.ffn_sparsity == pytest.approx(1 - 9 / 10)
    assert account.speed_bound == account.dense_active_parameters / account.active_parameters
    # Only the second expert was reached, by every token, and selected both routed ones.
    measured = account.measured_ffn_flops({2: 2.0}, {1: 0.0, 2: 1.0})
    assert measured == 8 + 12 * (6 + 4) + 4 * 2
    with pytest.raises(KeyError):
        account.measured_ffn_flops({2: 2.0})
