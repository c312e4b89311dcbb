"""Activation markers as sparse binary columns: which tokens mark which neuron.

The marker column of neuron j has a 1 at every token that counts j among its K_a most active neurons
(see ``weaver.algorithms.statistics.marker_neurons``). There are T * K_a ones among T * F entries,
so the columns stay sparse, and distances to dense centroids are sparse products.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

Floats = NDArray[np.float64]


def marker_columns(
    markers_TA: Tensor, neurons_n: Tensor, intermediate_size: int
) -> sparse.csr_array:
    """Marker columns of the given neurons as the rows of a binary matrix, (n, T).

    ``b[j, t] = 1  if neuron j is among the markers of token t, else 0``

    Args:
        markers_TA: marker neurons per token, (T, K_a), no id twice in a row.
        neurons_n: neuron ids, (n,), each at most once.
        intermediate_size: F.
    """
    tokens, top_k = markers_TA.shape
    row_of_F = torch.full((intermediate_size,), -1, dtype=torch.int64, device="cpu")
    row_of_F[neurons_n.cpu()] = torch.arange(neurons_n.numel(), device="cpu")
    rows = row_of_F[markers_TA.reshape(-1).long().cpu()].numpy()
    columns = np.repeat(np.arange(tokens), top_k)
    known = rows >= 0
    ones = np.ones(int(known.sum()))
    return sparse.csr_array(
        (ones, (rows[known], columns[known])), shape=(neurons_n.numel(), tokens)
    )


def l1_distances(binary_nT: sparse.csr_array, centroids_ET: Floats) -> Floats:
    """L1 distance of binary rows to centroids in [0, 1], (n, E).

    ``sum_t |b_t - c_t| = sum_t c_t + sum_{t: b_t = 1} (1 - 2 c_t)``

    The second sum runs over the ones of b alone, so the binary rows are never made dense.

    Raises:
        ValueError: a centroid leaves [0, 1], where the identity does not hold.
    """
    if centroids_ET.size and (centroids_ET.min() < 0 or centroids_ET.max() > 1):
        raise ValueError("centroids of binary columns must lie in [0, 1]")
    distances_nE: Floats = centroids_ET.sum(axis=1) + binary_nT @ (1.0 - 2.0 * centroids_ET.T)
    return distances_nE


def mean_columns(binary_nT: sparse.csr_array, owner_n: Tensor, num_clusters: int) -> Floats:
    """Mean marker column of every cluster, (E, T); no cluster may be empty."""
    owners = owner_n.cpu().numpy()
    size_E = np.bincount(owners, minlength=num_clusters)
    points = owners.size
    membership_En = sparse.csr_array(
        (1.0 / size_E[owners], (owners, np.arange(points))), shape=(num_clusters, points)
    )
    means_ET: Floats = (membership_En @ binary_nT).toarray()
    # Sums of 1/N may exceed 1 by a rounding error.
    return np.minimum(means_ET, 1.0)
