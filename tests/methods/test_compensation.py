"""Skip compensation: by hand, against FLAP, and against least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_conversions import overlapping_layout, random_layout, random_router
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward, glu_hidden
from weaver.algorithms.statistics import LayerStatistics
from weaver.artifacts.types import (
    REFIT_POWER,
    Compensation,
    ExpertLayout,
    LayerProfile,
    Router,
)
from weaver.methods import flap
from weaver.methods.compensation import CompensationPlan, solve_compensation
from weaver.models.moe import MoEFeedForward

NONE = torch.empty(0, 0, dtype=torch.int64)
TOKENS, NEURONS, HIDDEN = 400, 24, 6


def plan(*, refit: bool, constants: bool, shrinkage: float = 1e-7) -> CompensationPlan:
    return CompensationPlan(refit=refit, constants=constants, shrinkage=(shrinkage,))


def dense_layer(seed: int = 0, **biases: Any) -> tuple[GluWeights, LayerProfile]:
    """A random FFN, and a profile that keeps every token."""
    generator = torch.Generator().manual_seed(seed)
    gate_FD, up_FD, down_FD = torch.randn(3, NEURONS, HIDDEN, generator=generator)
    weights = GluWeights(gate_FD, up_FD, down_FD, "silu", **biases)
    statistics = LayerStatistics(weights, 1, 4, torch.arange(TOKENS))
    x_TD = torch.randn(TOKENS, HIDDEN, generator=generator) + 0.5
    statistics.update(x_TD, torch.zeros(TOKENS, dtype=torch.int64))
    return weights, statistics.finish(torch.zeros(1, dtype=torch.int64))


def squared_error(
    weights: GluWeights,
    profile: LayerProfile,
    layout: ExpertLayout,
    router: Router | None,
    compensation: Compensation | None,
) -> float:
    """Mean over the calibration tokens of the converted FFN's squared distance to the dense one."""
    x_TD = profile.ffn_inputs_ND
    ffn = MoEFeedForward.convert(weights, layout, router, compensation)
    return float((ffn(x_TD) - glu_forward(x_TD, weights)).square().sum(1).mean())


def static_layout(output_bias_D: Tensor | None = None) -> ExpertLayout:
    return ExpertLayout(NEURONS, 0, torch.arange(16), NONE, output_bias_D)


def test_constants_are_conditional_means_by_hand(make_profile: Any) -> None:
    # x = 1, 2, -1. Neuron 0: relu(x) x = 1, 4, 0; neuron 1: x + 1 = 2, 3, 0; neuron 2, which the
    # layout drops: relu(x) 2x = 2, 8, 0.
    weights = GluWeights(
        gate_FD=torch.tensor([[1.0], [0.0], [1.0]]),
        up_FD=torch.tensor([[1.0], [1.0], [2.0]]),
        down_FD=torch.tensor([[2.0], [4.0], [3.0]]),
        activation="relu",
        gate_bias_F=torch.tensor([0.0, 1.0, 0.0]),
        up_bias_F=torch.tensor([0.0, 1.0, 0.0]),
        output_bias_D=torch.tensor([100.0]),
    )
    profile = make_profile(3, ffn_inputs_ND=torch.tensor([[1.0], [2.0], [-1.0]]))
    experts_EN = torch.tensor([[0], [1]])
    layout = ExpertLayout(3, 1, NONE.flatten(), experts_EN, selection="threshold")
    # Expert 0 runs for x = 2, expert 1 for x = -1.
    router = Router(
        kind="linear",
        weight_ED=torch.tensor([[1.0], [-1.0]]),
        scale_E=torch.zeros(2),
        balance_bias_E=torch.zeros(2),
        bias_E=torch.tensor([-1.5, 0.0]),
    )
    found = solve_compensation(weights, profile, layout, router, plan(refit=False, constants=True))
    assert found is not None
    assert found.down_FD is None
    # Skipped means: (1 + 0) / 2 * 2 = 1 and (2 + 3) / 2 * 4 = 10; dropped: 10 / 3 * 3 = 10.
    assert found.expert_bias_ED is not None
    assert found.output_bias_D is not None
    assert found.expert_bias_ED.tolist() == [[-1.0], [-10.0]]
    assert found.output_bias_D.tolist() == pytest.approx([21.0])
    # x = 1: both skipped. x = 2: 8 for expert 0, c_1 = 10. x = -1: c_0 = 1, 0 for expert 1.
    ffn = MoEFeedForward.convert(weights, layout, router, found)
    expected = [100 + 10 + value for value in (11.0, 18.0, 1.0)]
    assert ffn(profile.ffn_inputs_ND).flatten().tolist() == pytest.approx(expected)
    # An expert that is never skipped has no constant.
    always = replace(router, bias_E=torch.tensor([9.0, 0.0]))
    found = solve_compensation(weights, profile, layout, always, plan(refit=False, constants=True))
    assert found is not None
    assert found.expert_bias_ED is not None
    assert found.expert_bias_ED.tolist() == [[0.0], [-10.0]]


def test_constants_of_a_static_layer_are_flaps_bias(make_problem: Any) -> None:
    weights, profile = dense_layer()
    problem = make_problem(profile, active_neurons=15, weights=weights)
    layout = flap.partition(problem, flap.FlapOptions(), torch.Generator())
    assert layout.output_bias_D is not None
    found = solve_compensation(weights, profile, layout, None, plan(refit=False, constants=True))
    assert found is not None
    assert found.down_FD is None
    assert found.expert_bias_ED is None
    assert found.output_bias_D is not None
    torch.testing.assert_close(found.output_bias_D, layout.output_bias_D, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("own_bias", [False, True], ids=["plain", "flap-bias"])
def test_a_weak_shrinkage_gives_the_least_squares_of_a_static_layer(own_bias: bool) -> None:
    weights, profile = dense_layer(output_bias_D=torch.full((HIDDEN,), 7.0))
    bias_D = torch.arange(HIDDEN) - 2.0 if own_bias else None
    layout = static_layout(bias_D)
    found = solve_compensation(weights, profile, layout, None, plan(refit=True, constants=False))
    assert found is not None
    assert found.down_FD is not None
    assert found.output_bias_D is None
    hidden_TF = glu_hidden(profile.ffn_inputs_ND, weights)
    # What the layout itself adds is not fitted a second time.
    target_TD = hidden_TF @ weights.down_FD - (0 if bias_D is None else bias_D)
    expected_SD = torch.linalg.lstsq(hidden_TF[:, :16], target_TD).solution
    torch.testing.assert_close(found.down_FD[:16], expected_SD, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.down_FD[16:], weights.down_FD[16:])
    after = squared_error(weights, profile, layout, None, found)
    assert after < squared_error(weights, profile, layout, None, None)


@pytest.mark.parametrize("selection", ["top-k", "threshold"])
@pytest.mark.parametrize("constants", [False, True])
def test_each_part_lowers_the_error_of_a_routed_layer(selection: Any, constants: bool) -> None:
    weights, profile = dense_layer()
    layout = random_layout(NEURONS, shared=4, experts=5, top_k=2, selection=selection)
    router = random_router("linear", 5, HIDDEN)

    def error(**parts: Any) -> float:
        found = solve_compensation(weights, profile, layout, router, plan(**parts))
        return squared_error(weights, profile, layout, router, found)

    plain = error(refit=False, constants=False)
    assert plain == squared_error(weights, profile, layout, router, None)
    with_constants = error(refit=False, constants=True)
    assert with_constants < plain
    refitted = error(refit=True, constants=constants)
    assert refitted < (with_constants if constants else plain)
    # The shrinkage goes from the refit back to the start.
    kept = error(refit=True, constants=constants, shrinkage=1e6)
    assert refitted < kept <= plain * (1 + 1e-3)


def test_refit_and_constants_are_the_least_squares_of_the_routed_layer() -> None:
    weights, profile = dense_layer()
    layout = random_layout(NEURONS, shared=4, experts=5, top_k=2, selection="threshold")
    router = random_router("linear", 5, HIDDEN)
    found = solve_compensation(weights, profile, layout, router, plan(refit=True, constants=True))
    after = squared_error(weights, profile, layout, router, found)
    x_TD = profile.ffn_inputs_ND
    chosen_TE = (x_TD @ router.weight_ED.T + router.balance_bias_E > 0).float()
    mask_TF = torch.ones(TOKENS, NEURONS)
    for expert, neurons_N in enumerate(layout.experts_EN):
        mask_TF[:, neurons_N] = chosen_TE[:, expert : expert + 1]
    z_TP = torch.cat([glu_hidden(x_TD, weights) * mask_TF, chosen_TE, torch.ones(TOKENS, 1)], 1)
    y_TD = glu_forward(x_TD, weights)
    best_PD = torch.linalg.lstsq(z_TP, y_TD).solution
    best = float((z_TP @ best_PD - y_TD).square().sum(1).mean())
    assert best <= after * (1 + 1e-5)
    assert after == pytest.approx(best, rel=1e-3)


def test_a_refit_is_closer_where_errors_cost_more() -> None:
    """The least squares of the tokens weighted by a power of their sensitivity."""
    weights, profile = dense_layer()
    costs_T = (2.0 * profile.ffn_inputs_ND[:, 0]).exp()
    weighted = replace(profile, input_sensitivities_N=costs_T)
    layout, fit = static_layout(), plan(refit=True, constants=False)
    found = solve_compensation(weights, weighted, layout, None, fit)
    assert found is not None
    assert found.down_FD is not None
    root_T1 = costs_T.pow(REFIT_POWER / 2)[:, None]
    hidden_TF = glu_hidden(profile.ffn_inputs_ND, weights)
    y_TD = hidden_TF @ weights.down_FD
    expected_SD = torch.linalg.lstsq(hidden_TF[:, :16] * root_T1, y_TD * root_T1).solution
    torch.testing.assert_close(found.down_FD[:16], expected_SD, atol=1e-3, rtol=1e-3)


def test_sixteen_bit_inputs_give_nearly_the_same() -> None:
    weights, profile = dense_layer()
    layout = random_layout(NEURONS, shared=4, experts=5, top_k=2)
    router = random_router("linear", 5, HIDDEN)
    coarse = replace(profile, ffn_inputs_ND=profile.ffn_inputs_ND.bfloat16())
    wanted = plan(refit=True, constants=True, shrinkage=0.1)
    found = solve_compensation(weights, coarse, layout, router, wanted)
    exact = solve_compensation(weights, profile, layout, router, wanted)
    assert found is not None
    for name, tensor in found.tensors().items():
        assert tensor.dtype == torch.float32, name
    errors = [squared_error(weights, profile, layout, router, each) for each in (found, exact)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_plan_that_does_nothing_makes_nothing() -> None:
    weights, profile = dense_layer()
    nothing = plan(refit=False, constants=False)
    assert solve_compensation(weights, profile, static_layout(), None, nothing) is None


def test_experts_that_overlap_have_the_constants_of_their_layout() -> None:
    weights, profile = dense_layer()
    bias_ED = torch.randn(3, HIDDEN)
    layout = overlapping_layout(NEURONS, experts=3, width=12, top_k=1, expert_bias_ED=bias_ED)
    router = random_router("linear", 3, HIDDEN, weighting="softmax")
    found = solve_compensation(weights, profile, layout, router, plan(refit=False, constants=True))
    assert found is not None
    assert list(found.tensors()) == ["expert_bias_ED"]
    assert found.expert_bias_ED is bias_ED
    with pytest.raises(ValueError, match="experts that overlap cannot be re-solved"):
        solve_compensation(weights, profile, layout, router, plan(refit=True, constants=True))
