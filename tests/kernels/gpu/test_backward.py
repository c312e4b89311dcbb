"""Gradients against those of the definition in float64, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from routed_problems import TOLERANCE, Problem, relative_error, tiles_backward
from torch import Tensor

from weaver.algorithms.glu import ACTIVATIONS, GluWeights
from weaver.kernels.gpu import backward
from weaver.kernels.gpu.backward import Needs, routed_gradients
from weaver.kernels.reference import MoELayer, masked_forward

CASES = (
    "ordinary",
    "an empty expert",
    "one hot expert",
    "all experts",
    "odd sizes",
    "uneven, a slot per expert",
    "no pair",
    "experts of one neuron",
    "one token",
    "odd sizes, uneven",
)
EVERYTHING = Needs(*[True] * 8)


def gradient_toward(problem: Problem) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(problem.x_TD.shape, generator=generator).to(problem.x_TD.dtype)


def run(problem: Problem, needs: Needs = EVERYTHING) -> dict[str, Tensor]:
    arguments = (problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK)
    return routed_gradients(gradient_toward(problem), *arguments, needs)


def truth(problem: Problem) -> dict[str, Tensor]:
    """Of the routed rows, in float64; of the factors by slot, 0 where a slot is not in use."""
    experts = problem.experts
    named = {
        "x": problem.x_TD,
        "gate": experts.gate_RD,
        "up": experts.up_RD,
        "down": experts.down_RD,
        "factors": problem.routing.weights_P,
        "gate_bias": experts.gate_bias_R,
        "up_bias": experts.up_bias_R,
        "expert_bias": experts.expert_bias_ED,
    }
    leaf = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in named.items()
        if tensor is not None
    }
    weights = GluWeights(
        leaf["gate"],
        leaf["up"],
        leaf["down"],
        experts.activation,
        leaf.get("gate_bias"),
        leaf.get("up_bias"),
    )
    routing = replace(problem.routing, weights_P=leaf["factors"])
    y_TD = masked_forward(leaf["x"], MoELayer(weights, 0, leaf.get("expert_bias")), routing)
    toward_TD = gradient_toward(problem).double()
    found = torch.autograd.grad(y_TD, list(leaf.values()), toward_TD)
    gradients = dict(zip(leaf, found, strict=True))
    by_slot_TK = torch.zeros(problem.ids_TK.shape, dtype=torch.float64)
    by_slot_TK[problem.ids_TK < experts.num_experts] = gradients["factors"]
    return {**gradients, "factors": by_slot_TK}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert gradient.shape == expected[name].shape, name
        if expected[name].any():
            assert relative_error(gradient, expected[name]) < tolerance, name
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("case", CASES)
def test_every_shape(make_problem: Any, case: str) -> None:
    problem = make_problem(case)
    found = run(problem)
    check(found, truth(problem), TOLERANCE[torch.float32])
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit(make_problem: Any, dtype: torch.dtype) -> None:
    problem = make_problem("uneven, a slot per expert", dtype)
    found = run(problem)
    check(found, truth(problem), TOLERANCE[dtype])
    for name, gradient in found.items():
        assert gradient.dtype == (torch.float32 if name == "factors" else dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(make_problem: Any, activation: str) -> None:
    problem = make_problem("odd sizes, uneven", activation=activation)
    check(run(problem), truth(problem), TOLERANCE[torch.float32])


@pytest.mark.parametrize("case", ["ordinary", "uneven, a slot per expert"])
def test_the_order_of_programs_does_not_matter(
    make_problem: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    problem = make_problem(case)
    forward = run(problem)
    monkeypatch.setattr(backward, "dispatch_pairs", tiles_backward)
    found = run(problem)
    assert all(torch.equal(found[name], forward[name]) for name in forward)


def test_without_biases_and_constants(make_problem: Any) -> None:
    problem = make_problem("odd sizes, uneven", biases=False)
    needs = Needs(True, True, True, True, True, False, False, False)
    check(run(problem, needs), truth(problem), TOLERANCE[torch.float32])


def test_an_expert_without_pairs_has_gradients_of_zero(make_problem: Any) -> None:
    problem = make_problem("an empty expert")
    found = run(problem)
    for name in ("gate", "up", "down", "gate_bias", "up_bias"):
        by_expert = found[name].view(4, 32, -1).abs().amax(dim=(1, 2))
        assert (by_expert > 0).tolist() == [False, True, True, True], name


@pytest.mark.parametrize("asked", range(8))
def test_only_what_is_asked_for(make_problem: Any, asked: int) -> None:
    problem = make_problem("experts of one neuron")
    needs = Needs(*[position == asked for position in range(8)])
    name = list(vars(needs))[asked]
    found = run(problem, needs)
    assert list(found) == [name]
    assert torch.equal(found[name], run(problem)[name])


def test_they_come_in_the_order_in_which_they_are_asked_for(make_problem: Any) -> None:
    assert list(run(make_problem("experts of one neuron"))) == list(vars(EVERYTHING))
    assert len(astuple(EVERYTHING)) == 8
