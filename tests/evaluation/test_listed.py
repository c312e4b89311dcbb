"""Divergence from listed log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaver.evaluation.listed import TOP, ListedTotals


def listed(log_q_V: torch.Tensor, count: int) -> dict[int, float]:
    top = log_q_V.topk(count)
    return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def test_tokens_that_are_not_listed_count_as_one() -> None:
    p = torch.tensor([0.5, 0.2, *[0.03] * 10])
    q = {0: math.log(0.4), 2: math.log(0.1)}
    totals = ListedTotals()
    totals.add(p.log()[None], [q])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.03 * math.log(0.03 / 0.1)
    expected += 0.47 * math.log(0.47 / 0.5)
    assert totals.mean_kl == pytest.approx(expected)
    assert (totals.positions, totals.top1_agreement) == (1, 1.0)


def test_a_likely_token_that_is_not_listed_differs_by_what_is_known() -> None:
    p = torch.tensor([0.7, 0.2, *[0.01] * 10])
    # Token 1 has at most 0.1 there; those of 0.01 may have as much.
    totals = ListedTotals()
    totals.add(p.log()[None], [{2: math.log(0.8), 0: math.log(0.1)}])
    assert totals.top1_agreement == 0
    assert totals.differences[:2] == pytest.approx([math.log(7), math.log(2)])
    assert sorted(totals.differences)[-1] == pytest.approx(math.log(80))
    assert len(totals.differences) == TOP
    assert totals.mean_difference == pytest.approx(math.log(7 * 2 * 80) / TOP)


@given(seed=st.integers(0, 1000), count=st.integers(1, 40))
def test_it_is_a_lower_bound_that_rises_with_what_is_listed(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (2 * torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(2))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    found = []
    for number in (count, 40):
        totals = ListedTotals()
        totals.add(log_p[None], [listed(log_q, number)])
        found.append(totals.mean_kl)
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    assert -1e-12 <= found[0] <= found[1] + 1e-12
    assert found[1] == pytest.approx(exact)
