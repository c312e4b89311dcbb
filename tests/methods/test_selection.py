"""Scores, thresholds and the experts they select."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.glu import glu_hidden
from weaver.methods.selection import fit_scores, sampled_hidden, select, selection_threshold

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
