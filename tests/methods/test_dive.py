"""DIVE's experts: by hand, against FLAP, and of domains that use other neurons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.algorithms.statistics import LayerStatistics
from weaver.artifacts.types import ExpertLayout
from weaver.methods import dive, flap
from weaver.methods.base import LayerProblem

GENERATOR = torch.Generator()

# Var * ||Wd||^2, ||Wd||^2 = 1, 4, 1, 9: of the first group 4, 4, 1, 0, of the second 1, 0, 2, 9, of
# the third 3, 0, 2, 9.
DOWN_FD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 3.0]])
VARIANCE_GF = torch.tensor([[4.0, 1.0, 1.0, 0.0], [1.0, 0.0, 2.0, 1.0], [3.0, 0.0, 2.0, 1.0]])
MEAN_GF = torch.tensor([[9.0, 9.0, 2.0, 5.0], [1.0, 1.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0]])


def run(problem: LayerProblem, top_k: int = 1) -> ExpertLayout:
    return dive.partition(problem, dive.DiveOptions(top_k=top_k), GENERATOR)


@pytest.fixture
def problem(make_profile: Any, make_problem: Any) -> LayerProblem:
    profile = make_profile(
        4,
        group_tokens_G=torch.tensor([10, 10, 10]),
        group_hidden_mean_GF=MEAN_GF,
        group_hidden_variance_GF=VARIANCE_GF,
    )
    weights = GluWeights(torch.ones(4, 2), torch.ones(4, 2), DOWN_FD, "silu")
    found: LayerProblem = make_problem(
        profile, active_neurons=2, num_experts=2, expert_width=2, weights=weights
    )
    return replace(found, group_experts_G=torch.tensor([0, 1, 1]))


def test_experts_by_hand(problem: LayerProblem) -> None:
    layout = run(problem)
    # The second expert has both other groups: mean variances 2, 0, 2, 1, scores 2, 0, 2, 9, of
    # which the tie goes to neuron 0.
    assert layout.experts_EN.tolist() == [[0, 1], [0, 3]]
    assert layout.overlap
    assert (layout.top_k, layout.active_neurons, layout.num_shared_neurons) == (1, 2, 0)
    assert (layout.weighting, layout.routed_scaling, layout.selection) == ("softmax", 1.0, "top-k")
    # Dropped: 2 * (1, 0) + 5 * (0, 3) and 1 * (0, 2) + 9 * (1, 0).
    assert layout.expert_bias_ED is not None
    assert layout.expert_bias_ED.tolist() == [[2.0, 15.0], [9.0, 2.0]]
    assert run(problem, top_k=2).active_neurons == 4


def test_means_that_differ_between_groups_are_variance(problem: LayerProblem) -> None:
    """Neuron 1 is constant in both groups of the second expert, 1 and 11: Var 25, score 100."""
    assert problem.profile.group_hidden_mean_GF is not None
    means_GF = MEAN_GF.clone()
    means_GF[2, 1] = 11.0
    profile = replace(problem.profile, group_hidden_mean_GF=means_GF)
    layout = run(replace(problem, profile=profile))
    assert layout.experts_EN.tolist() == [[0, 1], [1, 3]]


def test_one_expert_of_all_groups_is_flap(random_problem: Any) -> None:
    problem, x_TD = random_problem(0, neurons=24, active_neurons=10)
    groups_M = torch.arange(6) // 2
    statistics = LayerStatistics(problem.weights, 6, 4, torch.tensor([0]), groups_M, num_groups=3)
    statistics.update(x_TD, torch.arange(96) // 16)
    profile = statistics.finish(groups_M)
    static = flap.partition(problem, flap.FlapOptions(), GENERATOR)
    all_in_one = LayerProblem(0, problem.weights, profile, 10, 1, 10, torch.zeros(3).long())
    layout = run(all_in_one)
    assert torch.equal(layout.experts_EN[0], static.shared_S)
    assert layout.expert_bias_ED is not None
    torch.testing.assert_close(layout.expert_bias_ED[0], static.output_bias_D)


def domain_problem(domains: int, each: int) -> tuple[LayerProblem, Tensor]:
    """Tokens of a domain have its own inputs, which its own neurons read."""
    generator = torch.Generator().manual_seed(0)
    rows_FD = torch.eye(domains).repeat_interleave(each, 0)
    weights = GluWeights(rows_FD, rows_FD, torch.rand(domains * each, 5) + 0.5, "relu")
    domain_T = torch.arange(domains).repeat_interleave(64)
    x_TD = (1.0 + torch.rand(len(domain_T), 1, generator=generator)) * torch.eye(domains)[domain_T]
    groups_M = torch.arange(domains)
    statistics = LayerStatistics(
        weights, domains, 1, torch.tensor([0]), groups_M, num_groups=domains
    )
    statistics.update(x_TD, domain_T)
    profile = statistics.finish(groups_M)
    return LayerProblem(0, weights, profile, each, domains, each, groups_M), domain_T


def test_each_expert_has_the_neurons_of_its_domain() -> None:
    problem, _ = domain_problem(3, 4)
    layout = run(problem)
    assert layout.experts_EN.tolist() == torch.arange(12).view(3, 4).tolist()
    # What others read does not fire in a domain: nothing is made up for.
    assert layout.expert_bias_ED is not None
    assert float(layout.expert_bias_ED.abs().max()) == 0.0


def test_what_is_missing_is_said(problem: LayerProblem) -> None:
    with pytest.raises(ValueError, match="statistics by group"):
        run(replace(problem, group_experts_G=None))
    with pytest.raises(ValueError, match="statistics by group"):
        run(replace(problem, profile=replace(problem.profile, group_tokens_G=None)))
    with pytest.raises(ValueError, match="no tokens in these groups"):
        run(replace(problem, group_experts_G=torch.tensor([0, 0, 0])))
    with pytest.raises(ValidationError, match="less than or equal to 2"):
        dive.DiveOptions(top_k=3)
