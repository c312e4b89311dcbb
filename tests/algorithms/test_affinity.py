"""Domain affinity by hand, and clusters that were planted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.affinity import column_normalised, correlation_clusters, row_correlation


def test_columns_by_their_best_by_hand() -> None:
    perplexity_GG = torch.tensor([[10.0, 40.0], [20.0, 30.0]])
    expected_GG = torch.tensor([[1.0, 0.75], [0.5, 1.0]])
    torch.testing.assert_close(column_normalised(perplexity_GG), expected_GG)
    with pytest.raises(ValueError, match="positive and finite"):
        column_normalised(torch.tensor([[1.0, float("inf")], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="positive and finite"):
        column_normalised(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))


def test_correlation_by_hand() -> None:
    # Deviations (-1, 0, 1), (-1, 1, 0) and (1, 0, -1): 1 / 2, -1 and -1 / 2.
    rows_GG = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 1.0], [9.0, 8.0, 7.0]])
    expected_GG = torch.tensor([[1.0, 0.5, -1.0], [0.5, 1.0, -0.5], [-1.0, -0.5, 1.0]])
    torch.testing.assert_close(row_correlation(rows_GG), expected_GG.double())
    assert torch.allclose(row_correlation(rows_GG), torch.corrcoef(rows_GG.double()))


def test_a_row_that_does_not_vary_correlates_with_nothing() -> None:
    rows_GG = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    expected_GG = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    torch.testing.assert_close(row_correlation(rows_GG), expected_GG.double())


# Distances 1 - r: 0.1 between rows 0 and 2, 0.2 between 1 and 3, and on average
# (0.8 + 1.0 + 0.6 + 0.8) / 4 = 0.8 between these pairs.
PAIRS_GG = torch.tensor(
    [[1.0, 0.2, 0.9, 0.0], [0.2, 1.0, 0.4, 0.8], [0.9, 0.4, 1.0, 0.2], [0.0, 0.8, 0.2, 1.0]]
)


def test_average_linkage_by_hand() -> None:
    tree_M4, experts_G = correlation_clusters(PAIRS_GG, 2)
    assert experts_G.tolist() == [0, 1, 0, 1]
    assert tree_M4[:, :2].sort(dim=1).values.tolist() == [[0, 2], [1, 3], [4, 5]]
    torch.testing.assert_close(tree_M4[:, 2].float(), torch.tensor([0.1, 0.2, 0.8]))
    assert tree_M4[:, 3].tolist() == [2, 2, 4]
    assert correlation_clusters(PAIRS_GG, 3)[1].tolist() == [0, 1, 0, 2]
    assert correlation_clusters(PAIRS_GG, 4)[1].tolist() == [0, 1, 2, 3]
    assert correlation_clusters(PAIRS_GG, 1)[1].tolist() == [0, 0, 0, 0]


def test_equal_distances_give_as_many_clusters_as_asked() -> None:
    for clusters in range(1, 6):
        experts_G = correlation_clusters(torch.eye(5), clusters)[1]
        assert experts_G.unique().tolist() == list(range(clusters))


@pytest.mark.parametrize(("rows", "clusters"), [(1, 1), (3, 0), (3, 4)])
def test_what_cannot_be_clustered(rows: int, clusters: int) -> None:
    with pytest.raises(ValueError, match=f"{clusters} clusters of {rows} rows"):
        correlation_clusters(torch.eye(rows), clusters)


@given(seed=st.integers(0, 2**31), kinds=st.integers(2, 4), each=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_planted_clusters_are_found(seed: int, kinds: int, each: int) -> None:
    """Models pruned by one kind are good on it alone, by noise more or less."""
    generator = torch.Generator().manual_seed(seed)
    kind_G = torch.arange(kinds).repeat(each)
    noise_GG = torch.rand(len(kind_G), len(kind_G), generator=generator)
    other_GG = (kind_G[:, None] != kind_G).float()
    perplexity_GG = (20.0 + noise_GG + 10.0 * other_GG) * (
        1.0 + torch.rand(len(kind_G), generator=generator)
    )
    correlation_GG = row_correlation(column_normalised(perplexity_GG))
    assert correlation_clusters(correlation_GG, kinds)[1].tolist() == kind_G.tolist()
