"""Balanced assignment and balanced k-means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weaver.algorithms.balanced import balanced_assignment, balanced_kmeans, within_cluster_cost


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_partition(left_F: Tensor, right_F: Tensor) -> bool:
    """Whether two labellings group the points alike, whatever the labels."""
    left_FF = left_F[:, None] == left_F
    right_FF = right_F[:, None] == right_F
    return bool((left_FF == right_FF).all())


def planted(clusters: int, width: int, noise: float) -> tuple[Tensor, Tensor]:
    """Shuffled points around far centres, (F, 16), and the cluster of each, (F,)."""
    truth_F = torch.arange(clusters).repeat_interleave(width)
    truth_F = truth_F[torch.randperm(truth_F.numel(), generator=seeded(1))]
    centres_EM = torch.randn(clusters, 16, generator=seeded(2))
    points_FM = centres_EM[truth_F]
    return points_FM + noise * torch.randn(points_FM.shape, generator=seeded(3)), truth_F


def test_assignment_by_hand() -> None:
    # Every point prefers cluster 0. Moving costs 1, 5, 2 and 7, so points 0 and 2 move: 0+0+1+2.
    cost_FE = torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, 2.0], [0.0, 7.0]])
    assert balanced_assignment(cost_FE, 2).tolist() == [1, 0, 1, 0]


def test_assignment_beats_greedy_by_hand() -> None:
    # Greedy gives point 0 its best (0) and is left with 10: 10 in all. The optimum is 1 + 2 = 3.
    cost_FE = torch.tensor([[0.0, 1.0], [2.0, 10.0]])
    assert balanced_assignment(cost_FE, 1).tolist() == [1, 0]


@given(st.integers(1, 6), st.integers(1, 10), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_assignment_fills_every_cluster_and_is_deterministic(
    clusters: int, capacity: int, seed: int
) -> None:
    cost_FE = torch.randint(0, 4, (clusters * capacity, clusters), generator=seeded(seed)).float()
    owner_F = balanced_assignment(cost_FE, capacity)
    assert torch.bincount(owner_F, minlength=clusters).tolist() == [capacity] * clusters
    assert torch.equal(owner_F, balanced_assignment(cost_FE.clone(), capacity))


def test_assignment_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="7 points do not fill 2 clusters of 3"):
        balanced_assignment(torch.zeros(7, 2), 3)
    with pytest.raises(ValueError, match="finite"):
        balanced_assignment(torch.tensor([[0.0, float("nan")], [0.0, 0.0]]), 1)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_recovers_planted_clusters(seed: int) -> None:
    points_FM, truth_F = planted(clusters=8, width=12, noise=0.05)
    owner_F, centroids_EM = balanced_kmeans(points_FM, 8, seeded(seed))
    assert same_partition(owner_F, truth_F)
    torch.testing.assert_close(centroids_EM[owner_F[0]], points_FM[truth_F == truth_F[0]].mean(0))


def test_random_labels_do_not_recover_planted_clusters() -> None:
    _, truth_F = planted(clusters=8, width=12, noise=0.05)
    random_F = truth_F[torch.randperm(truth_F.numel(), generator=seeded())]
    assert not same_partition(random_F, truth_F)


def test_kmeans_by_hand() -> None:
    # Unbalanced k-means would split {0, 1, 2} from {10}; equal sizes force {0, 1} and {2, 10},
    # with means 0.5 and 6 and the objective 0.25 + 0.25 + 16 + 16 = 32.5.
    points_FM = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    owner_F, centroids_EM = balanced_kmeans(points_FM, 2, seeded())
    assert same_partition(owner_F, torch.tensor([0, 0, 1, 1]))
    assert sorted(centroids_EM.flatten().tolist()) == [0.5, 6.0]
    assert within_cluster_cost(points_FM, owner_F, centroids_EM) == 32.5


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_kmeans_sizes_determinism_and_objective(clusters: int, width: int, seed: int) -> None:
    points_FM = torch.randn(clusters * width, 3, generator=seeded(seed))
    previous = float("inf")
    for iterations in range(1, 6):
        owner_F, centroids_EM = balanced_kmeans(
            points_FM, clusters, seeded(seed), max_iterations=iterations, tolerance=0.0
        )
        assert torch.bincount(owner_F, minlength=clusters).tolist() == [width] * clusters
        objective = within_cluster_cost(points_FM, owner_F, centroids_EM)
        assert objective <= previous * (1 + 1e-5) + 1e-6
        previous = objective
    again_F, _ = balanced_kmeans(points_FM, clusters, seeded(seed), max_iterations=5, tolerance=0.0)
    assert torch.equal(owner_F, again_F)


def test_kmeans_survives_identical_points_and_a_far_origin() -> None:
    owner_F, _ = balanced_kmeans(torch.ones(12, 4), 3, seeded())
    assert torch.bincount(owner_F).tolist() == [4, 4, 4]
    points_FM, truth_F = planted(clusters=4, width=8, noise=0.05)
    far_F, _ = balanced_kmeans(points_FM + 1000.0, 4, seeded())
    assert same_partition(far_F, truth_F)


def test_kmeans_rejects_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="10 points do not divide into 3"):
        balanced_kmeans(torch.zeros(10, 2), 3, seeded())
    with pytest.raises(ValueError, match="max_iterations=0"):
        balanced_kmeans(torch.zeros(9, 2), 3, seeded(), max_iterations=0)
    with pytest.raises(ValueError, match="finite"):
        balanced_kmeans(torch.full((9, 2), float("inf")), 3, seeded())
