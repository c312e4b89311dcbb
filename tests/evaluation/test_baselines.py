"""Timing baselines of a converted FFN: each computes the same outputs as the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.evaluation.baselines import dense_variants, transformers_forward
from weaver.kernels.cpu import build
from weaver.kernels.reference import MoELayer, Routing, masked_forward


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ffn(hidden: int, neurons: int, *, biases: bool, activation: str = "silu") -> GluWeights:
    """Outputs have about unit variance for inputs of unit variance."""
    return GluWeights(
        gate_FD=normal(neurons, hidden, scale=2 * hidden**-0.5, seed=1),
        up_FD=normal(neurons, hidden, scale=hidden**-0.5, seed=2),
        down_FD=normal(neurons, hidden, scale=neurons**-0.5, seed=3),
        activation=activation,
        gate_bias_F=normal(neurons, seed=4) if biases else None,
        up_bias_F=normal(neurons, seed=5) if biases else None,
        output_bias_D=normal(hidden, seed=6) if biases else None,
    )


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("hidden", "neurons"), [(8, 20), (256, 520)])
def test_every_dense_variant_is_the_dense_ffn(
    hidden: int, neurons: int, biases: bool, activation: str, tokens: int
) -> None:
    weights = random_ffn(hidden, neurons, biases=biases, activation=activation)
    x_TD = normal(tokens, hidden)
    expected_TD = glu_forward(x_TD.double(), weights.to(torch.float64))
    for name, forward in dense_variants(weights).items():
        y_TD = forward(x_TD)
        assert y_TD.dtype == torch.float32, name
        torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_a_variant_where_it_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (random_ffn(256, neurons, biases=False) for neurons in (512, 511))
    monkeypatch.setattr(build, "is_available", lambda: True)
    assert list(dense_variants(large)) == ["linear", "rows", "native"]
    assert list(dense_variants(small)) == ["linear", "rows"]
    assert list(dense_variants(large.to(torch.float64))) == ["linear", "rows"]
    monkeypatch.setattr(build, "is_available", lambda: False)
    assert list(dense_variants(large)) == ["linear", "rows"]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("shared", "top_k"), [(8, 1), (8, 3), (0, 2)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_the_experts_of_transformers_are_the_same_ffn(
    implementation: str, shared: int, top_k: int, tokens: int
) -> None:
    experts, width, hidden = 5, 12, 16
    weights = random_ffn(hidden, shared + experts * width, biases=False, activation="gelu")
    # The only bias that experts of transformers do not need: the shared expert adds it.
    weights = replace(weights, output_bias_D=normal(hidden, seed=6))
    x_TD = normal(tokens, hidden)
    ids_TK = normal(tokens, experts, seed=7).topk(top_k).indices
    routing = Routing.of_top_k(ids_TK, 0.5 + normal(tokens, top_k, seed=8).abs(), experts)
    layer = MoELayer(weights, shared)
    forward = transformers_forward(layer, experts, implementation)
    expected_TD = masked_forward(x_TD, layer, routing)
    torch.testing.assert_close(forward(x_TD, routing), expected_TD, rtol=1e-4, atol=1e-5)


def test_the_experts_of_transformers_are_a_copy() -> None:
    weights = random_ffn(8, 4 + 3 * 4, biases=False)
    forward = transformers_forward(MoELayer(weights, 4), 3, "grouped_mm")
    x_TD, routing = normal(2, 8), Routing.of_top_k(torch.tensor([[2], [0]]), torch.ones(2, 1), 3)
    before_TD = forward(x_TD, routing)
    for matrix_FD in (weights.gate_FD, weights.up_FD, weights.down_FD):
        matrix_FD[4:] = 0
    torch.testing.assert_close(forward(x_TD, routing), before_TD, rtol=0, atol=0)
