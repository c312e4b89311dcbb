"""Training-free routers by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_hidden
from weaver.algorithms.ridge import ridge_fit
from weaver.artifacts.types import SELECTIONS, ExpertLayout, LayerProfile, Selection
from weaver.kernels.reference import ExpertChoice, route, router_logits
from weaver.methods.routers import ROUTERS, representative_neurons

Maker = Callable[..., Any]

LAYOUT = ExpertLayout(
    intermediate_size=5,
    top_k=1,
    shared_S=torch.tensor([4]),
    experts_EN=torch.tensor([[0, 2], [1, 3]]),
)
GATE_FD = torch.tensor([[1.0, 0.0], [0.0, 4.0], [3.0, 2.0], [6.0, 8.0], [9.0, 9.0]])
WEIGHTS = GluWeights(GATE_FD, GATE_FD.flip(1), GATE_FD, "silu", gate_bias_F=torch.ones(5))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_mean_gate_by_hand(make_profile: Maker) -> None:
    router = ROUTERS["mean-gate"].build(WEIGHTS, make_profile(5), LAYOUT, seeded())
    assert router.kind == "linear"
    assert router.weight_ED.tolist() == [[2.0, 1.0], [3.0, 6.0]]
    assert router.scale_E.tolist() == [0.0, 0.0]
    assert router.balance_bias_E.tolist() == [0.0, 0.0]


def test_representatives_by_hand(make_profile: Maker) -> None:
    # Expert (0, 1, 2): 0 marks tokens 0 and 1, 1 marks 0, 1 and 2, 2 marks token 2. The mean column
    # is (2/3, 2/3, 2/3): distances 4/3, 1, 5/3. Expert (3, 4, 5): 4 and 5 mark token 3, 3 nothing;
    # the mean is 2/3 there: 3 is 2/3 away, 4 and 5 are 1/3 away and the lower id wins.
    markers_TA = torch.tensor([[0, 1], [0, 1], [1, 2], [4, 5]], dtype=torch.int32)
    layout = replace(
        LAYOUT,
        intermediate_size=7,
        shared_S=torch.tensor([6]),
        experts_EN=torch.tensor([[0, 1, 2], [3, 4, 5]]),
    )
    profile = make_profile(7, marker_neurons_TA=markers_TA)
    assert representative_neurons(profile, layout).tolist() == [1, 4]


def test_representative_router_has_normalised_rows(make_profile: Maker) -> None:
    # Both members of an expert are equally near to their mean: 0 and 1 represent, then 3 does.
    profile = make_profile(5, marker_neurons_TA=torch.tensor([[0, 1]], dtype=torch.int32))
    router = ROUTERS["representative"].build(WEIGHTS, profile, LAYOUT, seeded())
    assert router.kind == "glu"
    torch.testing.assert_close(router.weight_ED, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    swapped = replace(LAYOUT, experts_EN=torch.tensor([[0, 2], [3, 1]]))
    router = ROUTERS["representative"].build(WEIGHTS, profile, swapped, seeded())
    assert router.up_weight_ED is not None
    torch.testing.assert_close(router.weight_ED[1], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(router.up_weight_ED[1], torch.tensor([0.8, 0.6]))


def test_random_router_has_the_stated_spread(make_profile: Maker) -> None:
    weights = GluWeights(torch.ones(5, 4096), torch.ones(5, 4096), torch.ones(5, 4096), "silu")
    router = ROUTERS["random"].build(weights, make_profile(5), LAYOUT, seeded())
    assert router.weight_ED.shape == (2, 4096)
    assert float(router.weight_ED.std()) == pytest.approx(1 / 64, rel=0.05)
    again = ROUTERS["random"].build(weights, make_profile(5), LAYOUT, seeded())
    assert torch.equal(router.weight_ED, again.weight_ED)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_kind_is_the_stated_one_and_static_layouts_are_refused(
    make_profile: Maker, name: str
) -> None:
    spec = ROUTERS[name]
    profile = make_profile(5, ffn_inputs_ND=torch.randn(8, 2, generator=seeded()))
    assert spec.build(WEIGHTS, profile, LAYOUT, seeded()).kind == spec.kind
    static = replace(LAYOUT, top_k=0, experts_EN=torch.empty(0, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no routed experts"):
        spec.build(WEIGHTS, make_profile(5), static, seeded())


def test_permuting_the_neurons_leaves_the_mean_gate(random_problem: Maker) -> None:
    problem, _ = random_problem(0, neurons=12, active_neurons=6)
    experts_EN = torch.randperm(12, generator=seeded()).view(3, 4)
    layout = ExpertLayout(12, 1, torch.empty(0, dtype=torch.int64), experts_EN)
    build = ROUTERS["mean-gate"].build
    router = build(problem.weights, problem.profile, layout, seeded())
    order_F = torch.randperm(12, generator=seeded())
    moved = replace(layout, experts_EN=torch.argsort(order_F)[experts_EN])
    permuted = build(problem.weights.select(order_F), problem.profile, moved, seeded())
    torch.testing.assert_close(permuted.weight_ED, router.weight_ED)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_ridge_router_selects_k_experts_on_average(
    random_problem: Maker, selection: Selection
) -> None:
    problem, _ = random_problem(3, neurons=24, active_neurons=12)
    experts_EN = torch.randperm(24, generator=seeded())[:20].view(5, 4)
    layout = ExpertLayout(24, 2, torch.empty(0, dtype=torch.int64), experts_EN, selection=selection)
    router = ROUTERS["ridge"].build(problem.weights, problem.profile, layout, seeded())
    x_TD = problem.profile.ffn_inputs_ND
    routing = route(x_TD, router, "silu", ExpertChoice(layout.top_k, selection))
    assert routing.num_pairs == 2 * x_TD.shape[0]
    counts_T = routing.selected_TE().sum(1)
    assert bool((counts_T == 2).all()) == (selection == "top-k")
    # The threshold shifts every score alike.
    other = replace(layout, selection="top-k" if selection == "threshold" else "threshold")
    shifted = ROUTERS["ridge"].build(problem.weights, problem.profile, other, seeded())
    assert torch.equal(shifted.weight_ED, router.weight_ED)
    assert router.bias_E is not None
    assert shifted.bias_E is not None
    offset_E = shifted.bias_E - router.bias_E
    torch.testing.assert_close(offset_E, offset_E[:1].expand(5))


def test_sensitive_tokens_get_more_experts(random_problem: Maker) -> None:
    """As many on average as without sensitivities; the mean is moved to where errors cost more."""
    problem, _ = random_problem(3, neurons=24, active_neurons=12)
    experts_EN = torch.randperm(24, generator=seeded())[:20].view(5, 4)
    layout = ExpertLayout(
        24, 2, torch.empty(0, dtype=torch.int64), experts_EN, selection="threshold"
    )
    x_TD = problem.profile.ffn_inputs_ND
    sensitive_T = x_TD[:, 0] > x_TD[:, 0].median()
    costs_T = torch.where(sensitive_T, 20.0, 0.05)

    def experts(profile: LayerProfile) -> Tensor:
        router = ROUTERS["ridge"].build(problem.weights, profile, layout, seeded())
        routing = route(x_TD, router, "silu", ExpertChoice(layout.top_k, "threshold"))
        return routing.selected_TE().float().sum(1)

    plain_T = experts(problem.profile)
    found_T = experts(replace(problem.profile, input_sensitivities_N=costs_T))
    assert found_T.sum() == plain_T.sum()
    assert found_T[sensitive_T].mean() > 1.2 * plain_T[sensitive_T].mean()


def test_the_ridge_router_predicts_centred_contributions(random_problem: Maker) -> None:
    problem, _ = random_problem(3, neurons=12, active_neurons=6)
    weights, profile = problem.weights, problem.profile
    layout = ExpertLayout(12, 1, torch.empty(0, dtype=torch.int64), torch.arange(12).view(3, 4))
    router = ROUTERS["ridge"].build(weights, profile, layout, seeded())
    x_TD = profile.ffn_inputs_ND
    hidden_TF = glu_hidden(x_TD, weights) - profile.hidden_mean_F
    output_TED = torch.einsum(
        "ten,end->ted", hidden_TF[:, layout.experts_EN], weights.down_FD[layout.experts_EN]
    )
    weight_ED, bias_E = ridge_fit(x_TD, output_TED.norm(dim=-1).sqrt(), 0.1)
    torch.testing.assert_close(router.weight_ED, weight_ED, atol=1e-4, rtol=1e-4)
    assert router.bias_E is not None
    torch.testing.assert_close(router.bias_E, bias_E, atol=1e-4, rtol=1e-4)


def test_the_error_router_by_hand(make_profile: Maker) -> None:
    """Two experts of one neuron each, h = x_0^2 and x_1^2, inputs on the axes."""
    weights = GluWeights(torch.eye(2), torch.eye(2), torch.tensor([[1.0], [2.0]]), "relu")
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(32, 1)
    layout = ExpertLayout(2, 1, torch.empty(0, dtype=torch.int64), torch.tensor([[0], [1]]))
    build = ROUTERS["error-ridge"].build
    router = build(weights, make_profile(2, ffn_inputs_ND=x_TD), layout, seeded())
    # Outputs 1 and 2, of which expert 1 misses 1 where x_0, expert 0 misses 2 where x_1: squared
    # errors 0, 1 and 4, 0 of mean 5 / 4. The ridge penalty keeps 1 / 1.1 of a slope.
    score_TE = router_logits(x_TD[:2], router, "relu")
    assert bool((score_TE[0] > score_TE[0, 1]).tolist() == [True, False])
    assert bool((score_TE[1] > score_TE[1, 0]).tolist() == [False, True])
    torch.testing.assert_close(
        score_TE.mean(0), torch.tensor([-2.0, -0.5]) / 1.25, atol=1e-3, rtol=1e-3
    )
    # A constant of 2 on the first expert makes up for what it misses, and is wrong elsewhere:
    # errors 4, 1 and 0, 0.
    biased = replace(layout, overlap=True, expert_bias_ED=torch.tensor([[2.0], [0.0]]))
    router = build(weights, make_profile(2, ffn_inputs_ND=x_TD), biased, seeded())
    score_TE = router_logits(x_TD[:2], router, "relu")
    torch.testing.assert_close(
        score_TE.mean(0), torch.tensor([-2.0, -0.5]) / 1.25, atol=1e-3, rtol=1e-3
    )
    assert score_TE[0].argmax() == 1


def test_the_error_router_counts_the_shared_neurons_in(random_problem: Maker) -> None:
    problem, _ = random_problem(3, neurons=12, active_neurons=6)
    weights, profile = problem.weights, problem.profile
    experts_EN = torch.tensor([[2, 3, 4], [4, 5, 6], [6, 7, 8]])
    layout = ExpertLayout(12, 1, torch.tensor([0, 1]), experts_EN, overlap=True)
    router = ROUTERS["error-ridge"].build(weights, profile, layout, seeded())
    x_TD = profile.ffn_inputs_ND
    hidden_TF = glu_hidden(x_TD, weights)
    error_TE = torch.stack(
        [
            (hidden_TF @ weights.down_FD - hidden_TF[:, ids] @ weights.down_FD[ids]).norm(dim=1)
            for ids in (torch.cat([layout.shared_S, expert_N]) for expert_N in experts_EN)
        ],
        dim=1,
    ).square()
    weight_ED, bias_E = ridge_fit(x_TD, -error_TE / error_TE.mean(), 0.1)
    torch.testing.assert_close(router.weight_ED, weight_ED, atol=1e-4, rtol=1e-4)
    assert router.bias_E is not None
    torch.testing.assert_close(router.bias_E, bias_E, atol=1e-4, rtol=1e-4)
