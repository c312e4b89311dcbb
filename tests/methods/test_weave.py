"""weave: sizes and order of its layouts, and that neurons move to where the router sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from weaver.algorithms.contributions import expert_contributions
from weaver.algorithms.glu import GluWeights
from weaver.artifacts.types import SELECTIONS, ExpertLayout, LayerProfile, Selection
from weaver.errors import WeaverError
from weaver.methods.base import LayerProblem
from weaver.methods.routers import ridge_router
from weaver.methods.selection import fit_scores, sampled_hidden, select
from weaver.methods.weave import WeaveOptions, partition, shared_scores

Maker = Callable[..., Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def captured_share(problem: LayerProblem, layout: ExpertLayout) -> float:
    """Share of the routed neurons' contribution that the selected experts' neurons have."""
    profile, down_FD = problem.profile, problem.weights.down_FD
    hidden_TF = sampled_hidden(profile.ffn_inputs_ND, problem.weights) - profile.hidden_mean_F
    contribution_TE = expert_contributions(hidden_TF, down_FD, layout.experts_EN)
    x_TD = profile.ffn_inputs_ND.float()
    weight_ED, bias_E = fit_scores(x_TD, contribution_TE)
    chosen_TE = select(x_TD @ weight_ED.T + bias_E, layout.top_k, layout.selection)
    value_TEN = (hidden_TF.square() * down_FD.square().sum(1))[:, layout.experts_EN]
    return float((value_TEN * chosen_TE[:, :, None]).sum() / value_TEN.sum())


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(
    "expected",  # active experts, shared share, shared experts, K
    [(6, 0.25, 2, 4), (6, 0.0, 0, 6), (4, 0.5, 2, 2), (1, 0.9, 0, 1), (2, 0.9, 1, 1)],
)
def test_sizes(
    random_problem: Maker, expected: tuple[int, float, int, int], selection: Selection
) -> None:
    active_experts, share, shared, top_k = expected
    active = 3 + 4 * active_experts
    problem, _ = random_problem(0, neurons=35, active_neurons=active, num_experts=8, expert_width=4)
    options = WeaveOptions(shared_share=share, selection=selection)
    layout = partition(problem, options, seeded())
    # Three neurons are left over.
    assert layout.num_shared_neurons == 3 + 4 * shared
    assert (layout.num_routed_experts, layout.top_k) == (8 - shared, top_k)
    assert layout.active_neurons == active
    assert layout.selection == selection


def test_the_shared_neurons_have_the_largest_centred_energy(
    make_profile: Maker, make_problem: Maker
) -> None:
    # Var * ||Wd||^2: 1*1, 2*4, 3*1, 9*0, 5*1, 1*9.
    profile = make_profile(
        6,
        hidden_variance_F=torch.tensor([1.0, 2.0, 3.0, 9.0, 5.0, 1.0]),
        ffn_inputs_ND=torch.randn(16, 2, generator=seeded()),
    )
    gate_FD = torch.randn(6, 2, generator=seeded(1))
    down_FD = torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 0], [0, 1], [3, 0]])
    weights = GluWeights(gate_FD, gate_FD, down_FD, "silu")
    problem = make_problem(
        profile, active_neurons=4, num_experts=3, expert_width=2, weights=weights
    )
    scores_F = shared_scores(problem, WeaveOptions())
    assert scores_F.tolist() == [1, 8, 3, 0, 5, 9]
    layout = partition(problem, WeaveOptions(shared_share=0.5), seeded())
    assert layout.shared_S.tolist() == [1, 5]


def test_the_same_generator_gives_the_same_layout(random_problem: Maker) -> None:
    problem, _ = random_problem(0, neurons=64, active_neurons=32, num_experts=16, expert_width=4)
    first, second = (partition(problem, WeaveOptions(), seeded(7)) for _ in range(2))
    assert torch.equal(first.permutation, second.permutation)


def test_experts_are_made_for_the_tokens_where_errors_cost_more(random_problem: Maker) -> None:
    """Nearly no weight on the other tokens gives the layout of a profile without them."""
    problem, _ = random_problem(0, neurons=64, active_neurons=32, num_experts=16, expert_width=4)
    tokens = problem.profile.ffn_inputs_ND.shape[0]
    sensitive_T = torch.arange(tokens) % 2 == 0
    costs_T = torch.where(sensitive_T, 1.0, 1e-30)
    weighted = replace(problem.profile, input_sensitivities_N=costs_T)

    def captured(profile: LayerProfile) -> float:
        layout = partition(replace(problem, profile=profile), WeaveOptions(), seeded())
        kept = problem.profile.keeping(sensitive_T.nonzero().flatten())
        return captured_share(replace(problem, profile=kept), layout)

    assert captured(weighted) > captured(problem.profile)


def test_inputs_are_thinned_evenly(random_problem: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 10 of 20 inputs it is every second one that counts."""
    problem, _ = random_problem(0, neurons=32, active_neurons=16, num_experts=8, expert_width=4)
    monkeypatch.setattr("weaver.methods.weave._CLUSTER_INPUTS", 10)
    monkeypatch.setattr("weaver.methods.weave._INPUTS_PER_DIMENSION", 1)
    thinned = partition(problem, WeaveOptions(), seeded())
    monkeypatch.undo()
    halved = replace(problem.profile, ffn_inputs_ND=problem.profile.ffn_inputs_ND[::2])
    expected = partition(replace(problem, profile=halved), WeaveOptions(), seeded())
    assert torch.equal(thinned.permutation, expected.permutation)


def planted(make_profile: Maker, make_problem: Maker) -> tuple[LayerProblem, Tensor]:
    """Neuron j is active on the tokens of topic j % 4 alone; and its topic, (F,)."""
    topics_F = torch.arange(32) % 4
    # One input dimension per topic, and a neuron reads that of its own.
    generator = seeded()
    gate_FD = 4 * torch.nn.functional.one_hot(topics_F, 4).float()
    gate_FD += 0.1 * torch.randn(32, 4, generator=generator)
    down_FD = torch.nn.functional.one_hot(topics_F, 4).float()
    weights = GluWeights(gate_FD, gate_FD, down_FD, "relu")
    topic_T = torch.arange(400) % 4
    x_TD = torch.nn.functional.one_hot(topic_T, 4) * (
        0.9 + 0.2 * torch.rand(400, 1, generator=generator)
    )
    profile: LayerProfile = make_profile(32, ffn_inputs_ND=x_TD)
    hidden_TF = sampled_hidden(profile.ffn_inputs_ND, weights)
    profile = replace(
        profile,
        hidden_mean_F=hidden_TF.mean(0),
        hidden_variance_F=hidden_TF.var(0, correction=0),
    )
    return (
        make_problem(profile, active_neurons=8, num_experts=4, expert_width=8, weights=weights),
        topics_F,
    )


@pytest.mark.parametrize("alternations", [0, 3])
def test_planted_topics_are_recovered(
    make_profile: Maker, make_problem: Maker, alternations: int
) -> None:
    problem, topics_F = planted(make_profile, make_problem)
    options = WeaveOptions(shared_share=0, alternations=alternations)
    layout = partition(problem, options, seeded())
    topics_EN = topics_F[layout.experts_EN]
    assert bool((topics_EN == topics_EN[:, :1]).all())
    router = ridge_router(problem.weights, problem.profile, layout, seeded())
    x_TD = problem.profile.ffn_inputs_ND
    assert router.bias_E is not None
    best_T = (x_TD @ router.weight_ED.T + router.bias_E).argmax(1)
    assert torch.equal(topics_EN[best_T, 0], x_TD.argmax(1))


def test_moving_neurons_repairs_clusters_that_the_router_cannot_tell(
    make_profile: Maker, make_problem: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From experts that mix all topics, the alternation finds ones that capture more."""
    problem, _ = planted(make_profile, make_problem)
    mixed_n = torch.arange(32) // 8  # blocks of consecutive ids: two neurons of every topic
    monkeypatch.setattr("weaver.methods.weave._coactivation_clusters", lambda *_: mixed_n)
    captured = []
    for rounds in (0, 1, 3):
        options = WeaveOptions(shared_share=0, alternations=rounds)
        captured.append(captured_share(problem, partition(problem, options, seeded())))
    assert captured[0] < captured[1]
    assert captured[0] < captured[2]


def test_all_active_or_none_routed_is_refused(random_problem: Maker) -> None:
    problem, _ = random_problem(0, neurons=32, active_neurons=32, num_experts=8, expert_width=4)
    with pytest.raises(WeaverError, match="layer 3 has 8 active experts of 8"):
        partition(problem, WeaveOptions(), seeded())
    nothing = replace(problem, active_neurons=0)
    with pytest.raises(WeaverError, match="0 active experts of 8"):
        partition(nothing, WeaveOptions(), seeded())
