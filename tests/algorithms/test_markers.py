"""Sparse marker columns against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.markers import l1_distances, marker_columns, mean_columns

MARKERS_TA = torch.tensor([[0, 1], [0, 3], [1, 3]], dtype=torch.int32)


def test_columns_by_hand() -> None:
    # Rows in the order asked for: neuron 3 is marked by tokens 1 and 2, neuron 0 by tokens 0 and 1.
    binary_nT = marker_columns(MARKERS_TA, torch.tensor([3, 0, 2]), 4)
    assert binary_nT.toarray().tolist() == [[0, 1, 1], [1, 1, 0], [0, 0, 0]]


def test_distance_and_mean_by_hand() -> None:
    binary_nT = marker_columns(MARKERS_TA, torch.tensor([3, 0, 2]), 4)
    means_ET = mean_columns(binary_nT, torch.tensor([0, 0, 1]), 2)
    assert means_ET.tolist() == [[0.5, 1.0, 0.5], [0, 0, 0]]
    # |0,1,1 - .5,1,.5| = 1; the empty column is 2 away from the first mean and 0 from the second.
    assert l1_distances(binary_nT, means_ET).tolist() == [[1, 2], [1, 2], [2, 0]]


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_sparse_distance_equals_the_dense_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    markers_TA = torch.rand(20, 9, generator=generator).topk(3, dim=1).indices
    neurons_n = torch.randperm(9, generator=generator)[:6]
    binary_nT = marker_columns(markers_TA, neurons_n, 9)
    centroids_ET = torch.rand(4, 20, generator=generator, dtype=torch.float64).numpy()
    dense_nE = np.abs(binary_nT.toarray()[:, None] - centroids_ET).sum(-1)
    np.testing.assert_allclose(l1_distances(binary_nT, centroids_ET), dense_nE, atol=1e-12)


def test_distance_rejects_centroids_outside_the_unit_interval() -> None:
    binary_nT = marker_columns(MARKERS_TA, torch.tensor([0]), 4)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
        l1_distances(binary_nT, np.full((1, 3), 1.5))
