"""Which groups of text need the same neurons: from perplexities of pruned models to clusters."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor


def column_normalised(perplexity_GG: Tensor) -> Tensor:
    """How near each model comes to the best one on each text.

    ``normalised_ij = min_k perplexity_kj / perplexity_ij``, in (0, 1]: texts that are hard for
    every model weigh no more than easy ones.

    Args:
        perplexity_GG: row i is the model pruned by group i, column j the text of group j, (G, G).
    Raises:
        ValueError: a value is not finite or not positive.
    Source: DIVE, arXiv:2506.09351, section 3.1.
    """
    if not bool((perplexity_GG.isfinite() & (perplexity_GG > 0)).all()):
        raise ValueError("perplexities are positive and finite")
    return perplexity_GG.min(dim=0).values / perplexity_GG


def row_correlation(rows_GG: Tensor) -> Tensor:
    """Pearson correlation of every row with every other, float64, (G, G).

    ``r_ik = <a_i, a_k> / (||a_i|| ||a_k||)`` with ``a`` the rows less their means. A row that does
    not vary correlates with no other one: 0, and 1 with itself.

    Args:
        rows_GG: a matrix, (G, G).
    Source: DIVE, arXiv:2506.09351, section 3.1.
    """
    centred_GG = rows_GG.double() - rows_GG.double().mean(dim=1, keepdim=True)
    norm_G1 = centred_GG.norm(dim=1, keepdim=True)
    # What is left of a constant row is rounding.
    flat_G1 = norm_G1 <= 1e-12 * rows_GG.double().norm(dim=1, keepdim=True)
    unit_GG = torch.where(flat_G1, 0.0, centred_GG / norm_G1.clamp_min(1e-300))
    correlation_GG = (unit_GG @ unit_GG.T).clamp(-1.0, 1.0)
    return correlation_GG.fill_diagonal_(1.0)


def correlation_clusters(correlation_GG: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster what correlates, hierarchically: average linkage on the distances ``1 - r``.

    Args:
        correlation_GG: symmetric, ones on the diagonal, (G, G).
        clusters: E.
    Returns:
        scipy's linkage matrix, float64, (G - 1, 4), and the cluster of each row, int64, (G,).
        Clusters are numbered by their first row.
    Raises:
        ValueError: fewer than two rows, or E lies outside 1..G.
    Source: DIVE, arXiv:2506.09351, section 3.1. The paper does not name the linkage.
    """
    groups = correlation_GG.shape[0]
    if groups < 2 or not 1 <= clusters <= groups:
        raise ValueError(f"{clusters} clusters of {groups} rows")
    distance_GG = (1.0 - correlation_GG.double()).numpy()
    np.fill_diagonal(distance_GG, 0.0)
    tree_M4 = linkage(squareform(distance_GG, checks=False), method="average")
    # The tree is cut by the number of merges: equal distances cannot give fewer clusters.
    found_G = torch.from_numpy(cut_tree(tree_M4, n_clusters=[clusters])[:, 0])
    first = list(dict.fromkeys(found_G.tolist()))
    numbered_G = torch.tensor([first.index(label) for label in found_G.tolist()], device="cpu")
    return torch.from_numpy(tree_M4), numbered_G
