"""The operator: registration, gradients through views, refusals, and that it never waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from routed_problems import TOLERANCE, Problem, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from weaver.algorithms.glu import GluWeights
from weaver.kernels.gpu import backward, decode, prefill
from weaver.kernels.gpu.experts import Experts
from weaver.kernels.gpu.op import routed_forward
from weaver.kernels.reference import MoELayer, Routing, masked_forward


def arguments(x_TD: Tensor, experts: Experts, ids_TK: Tensor, factors_TK: Tensor) -> list[Any]:
    """In the order of ``routed_forward``."""
    return [
        x_TD,
        experts.gate_RD,
        experts.up_RD,
        experts.down_RD,
        ids_TK,
        factors_TK,
        experts.num_experts,
        experts.activation,
        experts.gate_bias_R,
        experts.up_bias_R,
        experts.expert_bias_ED,
    ]


def of(problem: Problem) -> list[Any]:
    return arguments(problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "case", ["ordinary", "uneven, a slot per expert", "one token", "odd sizes, uneven", "no pair"]
)
def test_outputs(make_problem: Any, case: str, dtype: torch.dtype) -> None:
    problem = make_problem(case, dtype)
    y_TD = routed_forward(*of(problem))
    assert y_TD.dtype == dtype
    if problem.routing.num_pairs:
        assert relative_error(y_TD, problem.truth()) < TOLERANCE[dtype]
    else:
        assert y_TD.shape == problem.x_TD.shape
        assert not y_TD.any()


@pytest.mark.parametrize(("tokens", "taken"), [(4, "decode"), (5, "prefill")])
def test_the_kernels_for_the_number_of_tokens(
    make_problem: Any, monkeypatch: pytest.MonkeyPatch, tokens: int, taken: str
) -> None:
    called = []
    for module, name in ((decode, "decode"), (prefill, "prefill")):
        real = module.launch

        def spy(*given: Any, name: str = name, real: Any = real) -> None:
            called.append(name)
            real(*given)

        monkeypatch.setattr(module, "launch", spy)
    problem = make_problem("nothing shared")
    x_TD, ids_TK, factors_TK = (
        problem.x_TD[:tokens],
        problem.ids_TK[:tokens],
        problem.factors_TK[:tokens],
    )
    routed_forward(*arguments(x_TD, problem.experts, ids_TK, factors_TK))
    assert set(called) == {taken}


def test_no_token_and_no_slot(make_problem: Any) -> None:
    problem = make_problem("ordinary")
    for tokens, top_k in ((0, 2), (3, 0)):
        x_TD = problem.x_TD[:tokens].clone().requires_grad_()
        ids_TK, factors_TK = problem.ids_TK[:tokens, :top_k], problem.factors_TK[:tokens, :top_k]
        y_TD = routed_forward(*arguments(x_TD, problem.experts, ids_TK, factors_TK))
        assert y_TD.shape == (tokens, 40)
        assert not y_TD.any()
        (dx_TD,) = torch.autograd.grad(y_TD.sum(), x_TD)
        assert dx_TD.shape == (tokens, 40)
        assert not dx_TD.any()


@pytest.mark.parametrize("case", ["uneven, a slot per expert", "one token"])
def test_gradients_reach_the_stored_matrices(make_problem: Any, case: str) -> None:
    """Through views with an offset; the shared rows get none from the routed part."""
    problem = make_problem(case)
    shared, stored = problem.num_shared, problem.stored

    def leaves(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        named = (problem.x_TD, stored.gate_FD, stored.up_FD, stored.down_FD)
        biases = (stored.gate_bias_F, stored.up_bias_F, problem.expert_bias_ED)
        return [convert(tensor).clone().requires_grad_() for tensor in (*named, *biases)]

    ours = leaves(lambda tensor: tensor)
    x, gate, up, down, gate_bias, up_bias, constants = ours
    factors_TK = problem.factors_TK.clone().requires_grad_()
    experts = Experts(
        gate[shared:],
        up[shared:],
        down[shared:],
        problem.routing.num_experts,
        "silu",
        gate_bias[shared:],
        up_bias[shared:],
        constants,
    )
    y_TD = routed_forward(*arguments(x, experts, problem.ids_TK, factors_TK))
    # A gradient that is not next to each other in memory: it is expanded from one number.
    found = torch.autograd.grad(y_TD.sum(), [*ours, factors_TK])
    theirs = leaves(Tensor.double)
    x, gate, up, down, gate_bias, up_bias, constants = theirs
    weights = GluWeights(
        gate[shared:], up[shared:], down[shared:], "silu", gate_bias[shared:], up_bias[shared:]
    )
    expected = torch.autograd.grad(
        masked_forward(x, MoELayer(weights, 0, constants), problem.routing).sum(), theirs
    )
    for ours_, theirs_ in zip(found, expected, strict=False):
        assert relative_error(ours_, theirs_) < TOLERANCE[torch.float32]
    assert not found[1][:shared].any()
    assert found[-1].isfinite().all()


def test_only_the_router_learns(make_problem: Any) -> None:
    problem = make_problem("odd sizes, uneven")
    factors_TK = problem.factors_TK.clone().requires_grad_()
    y_TD = routed_forward(*arguments(problem.x_TD, problem.experts, problem.ids_TK, factors_TK))
    (found_TK,) = torch.autograd.grad(y_TD.sum(), factors_TK)
    unused_TK = problem.ids_TK == problem.routing.num_experts
    assert not found_TK[unused_TK].any()
    assert found_TK[~unused_TK].all()


@pytest.mark.parametrize("case", ["all experts, one token", "nothing shared"])
def test_the_operator_is_registered_as_torch_wants_it(make_problem: Any, case: str) -> None:
    problem = make_problem(case)
    given = of(replace(problem, factors_TK=problem.factors_TK.nan_to_num()))
    for position in (0, 1, 2, 3, 5, 8, 9, 10):
        given[position] = given[position].detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.weaver.routed_experts.default, tuple(given))


@pytest.mark.parametrize("case", ["uneven", "one token"])
def test_it_does_not_wait_for_the_device(
    make_problem: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Without values at hand, whatever would need one raises. Kernels are left out."""
    for module in (backward, decode, prefill):
        monkeypatch.setattr(module, "launch", lambda *_: None)
    problem = make_problem(case)
    mode = FakeTensorMode()
    x_TD, ids_TK, factors_TK, dy_TD = (
        mode.from_tensor(tensor)
        for tensor in (problem.x_TD, problem.ids_TK, problem.factors_TK, problem.x_TD)
    )
    experts = replace(
        problem.experts,
        **{
            name: mode.from_tensor(value)
            for name, value in vars(problem.experts).items()
            if isinstance(value, Tensor)
        },
    )
    with mode:
        if case == "one token":
            decode.decode_forward(x_TD, experts, ids_TK, factors_TK)
        else:
            for variant in ("pairs", "dense"):
                prefill.prefill_forward(x_TD, experts, ids_TK, factors_TK, variant)
        needs = backward.Needs(*[True] * 8)
        found = backward.routed_gradients(dy_TD, x_TD, experts, ids_TK, factors_TK, needs)
    assert len(found) == 8


def test_the_same_bits_again(make_problem: Any) -> None:
    problem = make_problem("uneven, a slot per expert", torch.bfloat16)
    x_TD = problem.x_TD.clone().requires_grad_()
    given = arguments(x_TD, problem.experts, problem.ids_TK, problem.factors_TK)

    def run() -> tuple[Tensor, Tensor]:
        y_TD = routed_forward(*given)
        return y_TD.detach(), torch.autograd.grad(y_TD.sum(), x_TD)[0]

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))


def test_by_hand() -> None:
    """One input, two experts of one neuron, ReLU, constants; the second slot is not in use."""
    gate_RD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    up_RD = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    down_RD = torch.tensor([[1.0, 0.0], [10.0, 20.0]])
    constants_ED = torch.tensor([[0.0, 0.0], [1.0, 7.0]])
    ids_TK, factors_TK = torch.tensor([[1, 2]]), torch.tensor([[0.5, float("nan")]])
    x_TD = torch.tensor([[2.0, 3.0]])
    weights = (gate_RD, up_RD, down_RD)
    # h = 3 * 6 = 18: 0.5 * (18 * (10, 20) + (1, 7)).
    y_TD = routed_forward(
        x_TD, *weights, ids_TK, factors_TK, 2, "relu", expert_bias_ED=constants_ED
    )
    assert y_TD.tolist() == [[90.5, 183.5]]
    routing = Routing(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]), 1, 2)
    expected_TD = masked_forward(
        x_TD, MoELayer(GluWeights(*weights, "relu"), 0, constants_ED), routing
    )
    assert torch.equal(y_TD, expected_TD)


REFUSED: dict[str, tuple[int, Any, str]] = {
    "activation": (7, "swish", "activation 'swish' is none of silu"),
    "experts": (6, 5, "96 rows do not divide into 5 experts"),
    "no neurons": (1, torch.zeros(0, 40), "0 rows do not divide into 4 experts"),
    "dtype": (0, torch.zeros(33, 40, dtype=torch.float64), "inputs of torch.float64"),
    "one dtype": (2, torch.zeros(96, 40, dtype=torch.float16), "up_RD of torch.float16"),
    "matrix": (3, torch.zeros(95, 40), r"down_RD of shape \(95, 40\), not \(96, 40\)"),
    "constants": (10, torch.zeros(96, 40), r"expert_bias_ED of shape \(96, 40\), not \(4, 40\)"),
    "tokens": (0, torch.zeros(32, 40), "inputs, ids and factors of shapes"),
    "slots": (4, torch.zeros(33, 3, dtype=torch.int64), "inputs, ids and factors of shapes"),
    "factors": (5, torch.zeros(33, 2, dtype=torch.bfloat16), "factors of torch.bfloat16"),
    "ids": (4, torch.zeros(33, 2), "ids of torch.float32"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_together_is_refused(make_problem: Any, what: str) -> None:
    position, value, message = REFUSED[what]
    given = of(make_problem("ordinary"))
    given[position] = value
    with pytest.raises(ValueError, match=message):
        routed_forward(*given)
