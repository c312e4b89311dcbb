"""Scores, thresholds and the experts they select."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.glu import glu_hidden
from weaver.artifacts.types import EARLY_TOKENS, EARLY_WEIGHT, REFIT_POWER, SELECTION_POWER
from weaver.methods.selection import (
    experts_by_place,
    fit_scores,
    mean_experts,
    routed_inputs,
    sampled_hidden,
    select,
    selection_threshold,
    threshold_slope,
)

SCORES_TE = torch.tensor([[9.0, 8.0, 7.0], [1.0, 6.0, 2.0]])


def test_threshold_by_hand() -> None:
    # One expert per token is two of six: 9 and 8 exceed 7, both of the first token.
    assert selection_threshold(SCORES_TE, 1) == 7.0
    assert select(SCORES_TE, 1, "threshold").tolist() == [[1, 1, 0], [0, 0, 0]]
    assert select(SCORES_TE, 2, "threshold").tolist() == [[1, 1, 1], [0, 1, 0]]
    assert select(SCORES_TE, 3, "threshold").tolist() == [[1, 1, 1], [1, 1, 1]]


def test_top_k_by_hand() -> None:
    assert select(SCORES_TE, 1, "top-k").tolist() == [[1, 0, 0], [0, 1, 0]]
    assert select(SCORES_TE, 2, "top-k").tolist() == [[1, 1, 0], [0, 1, 1]]


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31), st.data())
@settings(max_examples=50, deadline=None)
def test_both_select_k_experts_per_token_on_average(
    tokens: int, experts: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    scores_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    threshold_TE = select(scores_TE, top_k, "threshold")
    assert int(threshold_TE.sum()) == tokens * top_k
    chosen = scores_TE[threshold_TE.bool()]
    skipped = scores_TE[~threshold_TE.bool()]
    assert skipped.numel() == 0 or float(chosen.min()) > float(skipped.max())
    assert select(scores_TE, top_k, "top-k").sum(1).tolist() == [top_k] * tokens


def test_the_slope_is_that_of_the_scores_quantiles() -> None:
    # Ten experts with scores 0 to 9 for each of 100 tokens: one expert is one unit of score.
    scores_TE = torch.arange(10.0).expand(100, -1)
    assert threshold_slope(scores_TE, 5) == pytest.approx(5 * 3 / 3)
    # Between all experts and none there is no quantile to move to.
    assert threshold_slope(scores_TE[:1, :1], 1) == 0.0


@given(st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_threshold_that_follows_the_slope_selects_what_was_aimed_at(
    top_k: int, seed: int
) -> None:
    scores_TE = torch.randn(4000, 12, generator=torch.Generator().manual_seed(seed))
    scores_TE -= selection_threshold(scores_TE, top_k)
    slope = threshold_slope(scores_TE, top_k)
    for target in (0.8, 1.2):
        used = float((scores_TE > slope * (1 - target)).sum()) / 4000
        assert used == pytest.approx(target * top_k, rel=0.1)


def test_experts_by_place(make_profile: Any) -> None:
    chosen_TE = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    places_N = torch.tensor([2, EARLY_TOKENS - 1, EARLY_TOKENS, 99], dtype=torch.int32)
    profile = make_profile(3, ffn_inputs_ND=torch.zeros(4, 2), input_places_N=places_N)
    assert experts_by_place(profile, chosen_TE) == (2.5, 0.5)
    assert experts_by_place(profile.keeping(torch.tensor([0, 1])), chosen_TE[:2]) == (0.0, 0.0)
    plain = make_profile(3, ffn_inputs_ND=torch.zeros(4, 2))
    assert experts_by_place(plain, chosen_TE) == (0.0, 0.0)


def test_first_tokens_are_not_for_the_router(make_profile: Any) -> None:
    x_TD = torch.arange(12.0).view(6, 2)
    places_N = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
    profile = make_profile(3, ffn_inputs_ND=x_TD, input_places_N=places_N)
    assert routed_inputs(profile, "threshold").ffn_inputs_ND.tolist() == [[4, 5], [10, 11]]
    assert routed_inputs(profile, "top-k") is profile
    # Windows of first tokens alone leave nothing else to fit to.
    first = make_profile(3, ffn_inputs_ND=x_TD[:2], input_places_N=places_N[:2])
    assert routed_inputs(first, "threshold") is first


def test_first_tokens_are_paid_for_by_the_others(make_profile: Any) -> None:
    places_N = torch.tensor([0, 1, *range(2, 16)], dtype=torch.int32)
    profile = make_profile(3, ffn_inputs_ND=torch.zeros(16, 2), input_places_N=places_N)
    mean = mean_experts(profile, 6, 14)
    assert 14 * mean + 2 * 14 == pytest.approx(16 * 6)
    assert mean_experts(profile, 2, 14) == 1.0
    plain = make_profile(3, ffn_inputs_ND=torch.zeros(16, 2))
    assert mean_experts(plain, 6, 14) == 6


def test_early_tokens_and_small_outputs_count_more(make_profile: Any) -> None:
    places_N = torch.tensor([0, EARLY_TOKENS - 1, EARLY_TOKENS, 40], dtype=torch.int32)
    weights_N = torch.tensor([1.0, 1.0, 1.0, 3.0])
    profile = make_profile(
        3, ffn_inputs_ND=torch.zeros(4, 2), input_places_N=places_N, input_weights_N=weights_N
    )
    expected_N = torch.tensor([EARLY_WEIGHT, EARLY_WEIGHT, 1.0, 3.0])
    torch.testing.assert_close(profile.error_weights_N, expected_N / expected_N.mean())
    plain = make_profile(3, ffn_inputs_ND=torch.zeros(4, 2))
    assert plain.error_weights_N.tolist() == [1.0] * 4
    assert not plain.first_tokens_N.any()
    assert profile.keeping(torch.tensor([2, 3])).error_weights_N.tolist() == [0.5, 1.5]


def test_sensitive_tokens_count_more_in_a_refit_than_in_a_selection(make_profile: Any) -> None:
    sensitivity_N = torch.tensor([1.0, 16.0])
    profile = make_profile(3, ffn_inputs_ND=torch.zeros(2, 2), input_sensitivities_N=sensitivity_N)
    refit, selection = (
        float(weights_N[1] / weights_N[0])
        for weights_N in (profile.error_weights_N, profile.selection_weights_N)
    )
    assert refit == pytest.approx(16**REFIT_POWER)
    assert selection == pytest.approx(16**SELECTION_POWER)
    assert refit > selection
    assert profile.keeping(torch.tensor([1])).input_sensitivities_N.tolist() == [16.0]


def test_scores_predict_the_root_of_the_contributions_norm() -> None:
    x_TD = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    truth_ED = torch.tensor([[0.2, 0.0, -0.1], [0.0, 0.3, 0.0]])
    root_TE = 5 + x_TD @ truth_ED.T
    weight_ED, bias_E = fit_scores(x_TD, root_TE.pow(4))
    # The penalty of 0.1 shrinks standardised coefficients by 1.1, the intercept not at all.
    torch.testing.assert_close(weight_ED, truth_ED / 1.1, atol=0.02, rtol=0)
    torch.testing.assert_close((x_TD @ weight_ED.T + bias_E).mean(0), root_TE.mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_of_the_kept_inputs(dtype: torch.dtype, random_problem: Any) -> None:
    problem, _ = random_problem(0, neurons=12, active_neurons=6)
    profile = problem.profile
    object.__setattr__(profile, "ffn_inputs_ND", profile.ffn_inputs_ND.to(dtype))
    hidden_TF = sampled_hidden(profile.ffn_inputs_ND, problem.weights)
    assert hidden_TF.dtype == torch.float32
    expected_TF = glu_hidden(profile.ffn_inputs_ND.float(), problem.weights)
    tolerance = 1e-6 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(hidden_TF, expected_TF, atol=tolerance, rtol=tolerance)
    assert torch.equal(hidden_TF, hidden_TF.to(dtype).float())
