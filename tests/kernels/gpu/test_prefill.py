"""Grouped GEMMs over tiles against the definition in float64, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routed_problems import SHAPES, TOLERANCE, relative_error, tiles_backward
from torch import Tensor

from weaver.algorithms.glu import ACTIVATIONS
from weaver.kernels.gpu import prefill
from weaver.kernels.gpu.prefill import dense_factors, prefill_forward, slot_sum
from weaver.kernels.gpu.variants import Variant

VARIANTS: tuple[Variant, ...] = ("pairs", "dense")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", SHAPES)
def test_every_shape(make_problem: Any, case: str, variant: Variant) -> None:
    problem = make_problem(case)
    found_TD = prefill_forward(
        problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK, variant
    )
    assert found_TD.dtype == torch.float32
    assert found_TD.shape == problem.x_TD.shape
    if problem.routing.num_pairs == 0:
        assert not found_TD.any()
    else:
        assert relative_error(found_TD, problem.truth()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["ordinary", "uneven"])
def test_sixteen_bit(make_problem: Any, case: str, dtype: torch.dtype, variant: Variant) -> None:
    problem = make_problem(case, dtype)
    found_TD = prefill_forward(
        problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK, variant
    )
    assert found_TD.dtype == dtype
    assert relative_error(found_TD, problem.truth()) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_every_activation(make_problem: Any, activation: str, biases: bool) -> None:
    problem = make_problem("an empty expert", activation=activation, biases=biases)
    found_TD = prefill_forward(
        problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK, "pairs"
    )
    assert relative_error(found_TD, problem.truth()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs_and_short_ids(make_problem: Any, variant: Variant) -> None:
    """Rows of x that are not next to each other, and ids of 32 bits."""
    problem = make_problem("ordinary")
    wide_TD = torch.full((problem.x_TD.shape[0], 100), float("nan"))
    x_TD = wide_TD[:, 3 : 3 + problem.x_TD.shape[1]]
    x_TD.copy_(problem.x_TD)
    found_TD = prefill_forward(
        x_TD, problem.experts, problem.ids_TK.int(), problem.factors_TK, variant
    )
    assert relative_error(found_TD, problem.truth()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_again(make_problem: Any, variant: Variant) -> None:
    problem = make_problem("uneven, a slot per expert", torch.bfloat16)

    def run() -> Tensor:
        arguments = (problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK)
        return prefill_forward(*arguments, variant)

    assert torch.equal(run(), run())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["ordinary", "odd sizes"])
def test_the_order_of_programs_does_not_matter(
    make_problem: Any, monkeypatch: pytest.MonkeyPatch, case: str, variant: Variant
) -> None:
    """No program writes what belongs to another, which the last one to write would hide."""
    problem = make_problem(case)
    arguments = (problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK, variant)
    forward_TD = prefill_forward(*arguments)
    monkeypatch.setattr(prefill, "dispatch_pairs", tiles_backward)
    assert torch.equal(prefill_forward(*arguments), forward_TD)


def test_the_sum_over_slots_by_hand(make_problem: Any) -> None:
    """Two tokens with two slots each, the second slot of the last one not in use."""
    experts = make_problem("experts of one neuron").experts
    outputs_PD = torch.zeros(4, 8)
    outputs_PD[:, 0] = torch.tensor([1.0, 10.0, 100.0, float("nan")])
    ids_TK = torch.tensor([[3, 0], [2, 7]])
    assert slot_sum(outputs_PD, ids_TK, experts)[:, 0].tolist() == [11.0, 100.0]
    factors_TK = torch.tensor([[2.0, 3.0], [0.5, float("nan")]])
    constants_ED = torch.zeros(7, 8)
    constants_ED[:, 0] = torch.arange(7.0)
    # 2 (1 + 3) + 3 (10 + 0) and 0.5 (100 + 2).
    y_TD = slot_sum(outputs_PD, ids_TK, experts, factors_TK, constants_ED)
    assert y_TD[:, 0].tolist() == [38.0, 51.0]
    assert not y_TD[:, 1:].any()


def test_dense_factors_by_hand() -> None:
    ids_TK = torch.tensor([[2, 0], [1, 3], [3, 3]])
    factors_TK = torch.tensor([[0.5, 2.0], [3.0, float("nan")], [9.0, 9.0]])
    expected = [[2.0, 0.0, 0.5], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]
    assert dense_factors(ids_TK, factors_TK, 3).tolist() == expected
