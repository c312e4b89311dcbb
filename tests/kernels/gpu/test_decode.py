"""The two launches for a few tokens against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from routed_problems import FEW_TOKENS, TOLERANCE, Problem, relative_error
from torch import Tensor

from weaver.algorithms.glu import ACTIVATIONS
from weaver.kernels.gpu import decode
from weaver.kernels.gpu.decode import decode_forward
from weaver.kernels.gpu.launch import launch


def run(problem: Problem) -> Tensor:
    return decode_forward(problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK)


@pytest.mark.parametrize("case", FEW_TOKENS)
def test_every_shape(make_problem: Any, case: str) -> None:
    problem = make_problem(case)
    found_TD = run(problem)
    assert found_TD.dtype == torch.float32
    assert found_TD.shape == problem.x_TD.shape
    if problem.routing.num_pairs == 0:
        assert not found_TD.any()
    else:
        assert relative_error(found_TD, problem.truth()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["one token", "odd sizes, uneven"])
def test_sixteen_bit(make_problem: Any, case: str, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    found_TD = run(problem)
    assert found_TD.dtype == dtype
    assert relative_error(found_TD, problem.truth()) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True])
def test_every_activation(make_problem: Any, activation: str, biases: bool) -> None:
    problem = make_problem("one token", activation=activation, biases=biases)
    assert relative_error(run(problem), problem.truth()) < TOLERANCE[torch.float32]


def test_short_ids_and_the_same_bits_again(make_problem: Any) -> None:
    problem = make_problem("odd sizes, uneven", torch.bfloat16)
    first_TD = run(problem)
    assert torch.equal(first_TD, run(problem))
    assert torch.equal(first_TD, run(replace(problem, ids_TK=problem.ids_TK.int())))


def test_nothing_is_stored_for_a_slot_that_is_not_in_use(
    make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem("odd sizes, uneven")
    stored = []

    def spy(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        if kernel is decode.decode_hidden_kernel:
            arguments["weighted_PN"].fill_(float("nan"))
        launch(kernel, grid, arguments)
        stored.append(arguments["weighted_PN"].clone())

    monkeypatch.setattr(decode, "launch", spy)
    run(problem)
    used_P = problem.ids_TK.reshape(-1) < problem.routing.num_experts
    assert stored[0][used_P].isfinite().all()
    assert stored[0][~used_P].isnan().all()
