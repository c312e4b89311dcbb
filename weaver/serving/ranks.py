"""Tensor parallelism: every rank has some neurons of the shared part and of every expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from weaver.errors import WeaverError
from weaver.models.accounting import LayerShape


def cut(count: int, rank: int, ranks: int) -> slice:
    """A rank's part of ``count`` neurons: ``floor(count r / R)`` to ``floor(count (r + 1) / R)``.

    Args:
        count: neurons of the shared part, or of one expert.
        rank, ranks: r and R.
    """
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def cut_shape(shape: LayerShape, rank: int, ranks: int) -> LayerShape:
    """Shape of a rank's part of a layer: fewer neurons in the shared part and in every expert.

    Every rank has all experts and the whole router, and so selects the same experts.

    Raises:
        WeaverError: an expert has fewer neurons than there are ranks.
    """
    width = shape.moe_intermediate_size
    if shape.n_routed_experts and width < ranks:
        raise WeaverError(
            f"{ranks} ranks for experts of {width} neurons",
            why="tensor parallelism cuts the neurons of every expert",
            fix=f"--tensor-parallel-size {width} at most",
        )
    shared, own = cut(shape.num_shared_neurons, rank, ranks), cut(width, rank, ranks)
    return replace(
        shape,
        num_shared_neurons=shared.stop - shared.start,
        moe_intermediate_size=own.stop - own.start,
    )


def cut_rows(rows_FD: Tensor, shape: LayerShape, rank: int, ranks: int) -> Tensor:
    """A rank's neurons of a stored tensor, shared ones first, (S_r + E N_r, ...).

    Args:
        rows_FD: a row per neuron, (S + E N, ...).
        shape: of the whole layer.
        rank, ranks: which part of how many.
    """
    shared, experts = shape.num_shared_neurons, shape.n_routed_experts
    own = [rows_FD[:shared][cut(shared, rank, ranks)]]
    if experts:
        routed_ENx = rows_FD[shared:].unflatten(0, (experts, -1))
        own.append(routed_ENx[:, cut(shape.moe_intermediate_size, rank, ranks)].flatten(0, 1))
    return torch.cat(own)
