"""Agreement of two splits: hand-worked numbers, and what renumbering must not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_conversions import random_layout
from torch import Tensor

from weaver.artifacts.types import ExpertLayout
from weaver.evaluation.stability import (
    expert_jaccard,
    jaccard,
    sample_halves,
    score_correlation,
    shared_jaccard,
)

SEEDS = st.integers(0, 2**31)


def layout(shared: list[int], experts: list[list[int]], neurons: int = 8) -> ExpertLayout:
    return ExpertLayout(
        intermediate_size=neurons,
        top_k=1 if experts else 0,
        shared_S=torch.tensor(shared, dtype=torch.int64),
        experts_EN=torch.tensor(experts) if experts else torch.empty(0, 0, dtype=torch.int64),
    )


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_jaccard_by_hand() -> None:
    assert jaccard(ids(6, 7, 1), ids(7, 5, 1)) == 2 / 4
    assert jaccard(ids(1, 2), ids(3, 4)) == 0
    assert jaccard(ids(), ids(3)) == 0
    assert jaccard(ids(), ids()) == 1


def test_experts_are_matched_as_a_whole() -> None:
    first = layout([6, 7], [[0, 1, 2], [3, 4, 5]])
    second = layout([6, 7], [[0, 3, 4], [1, 2, 5]])
    # J is 1/5 and 2/4 in the first row, 2/4 and 1/5 in the second.
    assert expert_jaccard(first, second) == pytest.approx(0.5)
    assert shared_jaccard(first, second) == 1


def test_an_expert_without_a_partner_counts_nothing() -> None:
    first = layout([4, 5, 6, 7], [[0, 1], [2, 3]])
    second = layout([6, 7], [[0, 1], [2, 3], [4, 5]])
    assert expert_jaccard(first, second) == pytest.approx(2 / 3)
    assert expert_jaccard(second, first) == pytest.approx(2 / 3)
    assert shared_jaccard(first, second) == 2 / 4


def test_what_is_not_there_has_no_index() -> None:
    static = layout([0, 1, 2], [])
    assert expert_jaccard(static, static) is None
    assert shared_jaccard(static, layout([1, 2, 3], [])) == 2 / 4
    routed = layout([], [[0, 1], [2, 3]], neurons=4)
    assert shared_jaccard(routed, routed) is None
    with pytest.raises(ValueError, match="layouts of 8 and 4 neurons"):
        expert_jaccard(static, routed)


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 and 1 4 2 3: sum of d^2 is 6, 1 - 6 * 6 / (4 * 15).
    first_F, second_F = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([10.0, 40.0, 20.0, 30.0])
    assert score_correlation(first_F, second_F) == pytest.approx(0.4)
    # Tied ranks 1 2.5 2.5 4 against 1 2 3 4: 4.5 / sqrt(4.5 * 5).
    tied_F = torch.tensor([0.0, 5.0, 5.0, 6.0])
    assert score_correlation(tied_F, first_F) == pytest.approx(4.5 / 22.5**0.5)
    assert score_correlation(first_F, -first_F) == pytest.approx(-1)
    assert score_correlation(first_F, torch.ones(4)) is None
    assert score_correlation(torch.ones(4), first_F) is None


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_layout_agrees_with_itself(seed: int) -> None:
    one = random_layout(20, shared=4, experts=4, top_k=2, seed=seed)
    assert expert_jaccard(one, one) == 1.0
    assert shared_jaccard(one, one) == 1.0


@given(SEEDS, SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_order_of_experts_and_of_the_layouts_changes_nothing(seed: int, order: int) -> None:
    first = random_layout(20, shared=4, experts=4, top_k=2, seed=seed)
    second = random_layout(20, shared=4, experts=4, top_k=2, seed=order)
    permutation = torch.randperm(4, generator=torch.Generator().manual_seed(order))
    renumbered = ExpertLayout(
        20, 2, second.shared_S.flip(0), second.experts_EN[permutation].flip(1)
    )
    index = expert_jaccard(first, second)
    assert index is not None
    assert 0 <= index <= 1
    assert expert_jaccard(first, renumbered) == pytest.approx(index)
    assert expert_jaccard(second, first) == pytest.approx(index)
    assert expert_jaccard(second, renumbered) == 1.0
    assert shared_jaccard(first, renumbered) == shared_jaccard(second, first)


def test_halves_by_hand() -> None:
    # Samples by group: 1, 3, 4 of group 0, then 0, 2 of group 1; every second one: 3 and 0.
    first_n, second_n = sample_halves(ids(0, 0, 1, 2, 3, 3, 4), ids(1, 0, 1, 0, 0))
    assert first_n.tolist() == [2, 3, 6]
    assert second_n.tolist() == [0, 1, 4, 5]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_halves_cover_all_tokens_and_share_no_sample(samples: list[int], groups: int) -> None:
    sample_ids_N, groups_M = torch.tensor(samples), torch.arange(10) % groups
    first_n, second_n = sample_halves(sample_ids_N, groups_M)
    assert sorted([*first_n.tolist(), *second_n.tolist()]) == list(range(len(samples)))
    of_first = set(sample_ids_N[first_n].tolist())
    of_second = set(sample_ids_N[second_n].tolist())
    assert not of_first & of_second
    assert 0 <= len(of_first) - len(of_second) <= 1
