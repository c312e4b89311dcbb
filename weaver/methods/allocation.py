"""How wide an expert is and how many neurons of every layer stay active."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weaver.errors import WeaverError


def plan_width(intermediate_size: int, num_experts: int, multiple: int) -> int:
    """N, the neurons of one slice of the FFN.

    ``N = F / Ne`` if ``multiple`` is 1, else ``N = floor(F / Ne / multiple) * multiple``. What is
    left over, ``F - Ne * N``, joins the shared expert.

    Args:
        intermediate_size: F.
        num_experts: Ne, slices of the FFN, shared ones counted in.
        multiple: the width must be a multiple of this (tile sizes of kernels); 1 wants an exact
            division.
    Raises:
        WeaverError: fewer than two experts, F does not divide, or N would be 0.
    """
    if num_experts < 2:
        raise WeaverError(
            f"num_experts={num_experts}",
            why="routing needs at least two experts",
            fix="--num-experts 8",
        )
    if multiple == 1 and intermediate_size >= num_experts and intermediate_size % num_experts:
        below, above = _nearest_divisors(intermediate_size, num_experts)
        raise WeaverError(
            f"{intermediate_size} neurons do not divide into {num_experts} experts",
            why="all experts have the same width unless a width multiple leaves some neurons over, "
            f"which then join the shared expert; the nearest divisors are {below} and {above}",
            fix=f"--num-experts {below}, --num-experts {above}, or --expert-width-multiple "
            f"{_suggested_multiple(intermediate_size // num_experts)}",
        )
    width = intermediate_size // num_experts // multiple * multiple
    if width == 0:
        raise WeaverError(
            f"{num_experts} experts of {intermediate_size} neurons in multiples of {multiple}: "
            "an expert would be empty",
            why=f"{intermediate_size} / {num_experts} is below {multiple}",
            fix="lower --num-experts or --expert-width-multiple",
        )
    return width


def pruned_width(intermediate_size: int, top_k: int, multiple: int, sparsity: float) -> int:
    """N, the neurons of an expert that is a pruning of the whole FFN.

    ``N = round(F * (1 - s) / K)``, rounded down to a multiple.

    Args:
        intermediate_size: F.
        top_k: K, experts active per token.
        multiple: the width must be a multiple of this.
        sparsity: s, of active neurons: K of F * (1 - s) / K neurons each.
    Raises:
        WeaverError: N would be 0.
    """
    width = round(intermediate_size * (1.0 - sparsity) / top_k) // multiple * multiple
    if width == 0:
        raise WeaverError(
            f"sparsity {sparsity:g} leaves {top_k} of {intermediate_size} neurons in multiples of "
            f"{multiple}: an expert would be empty",
            why=f"{intermediate_size} * (1 - {sparsity:g}) / {top_k} is below {multiple}",
            fix="lower the sparsity or --expert-width-multiple",
        )
    return width


def active_neurons(
    intermediate_size: int, num_experts: int, expert_width: int, sparsity: float
) -> int:
    """A, the neurons every token of a layer uses at a wanted FFN sparsity s.

    ``A = leftover + N * round((F * (1 - s) - leftover) / N)`` with ``leftover = F - Ne * N``;
    ``A = round(F * (1 - s))`` for a static method (``num_experts`` and ``expert_width`` 0).

    Raises:
        WeaverError: nothing would be active, or everything.
    """
    target = intermediate_size * (1.0 - sparsity)
    if num_experts == 0:
        return _static_neurons(intermediate_size, round(target), sparsity)
    leftover = intermediate_size - num_experts * expert_width
    active = round((target - leftover) / expert_width)
    if not 1 <= active < num_experts:
        low = 1 - (leftover + (num_experts - 1) * expert_width) / intermediate_size
        high = 1 - (leftover + expert_width) / intermediate_size
        raise WeaverError(
            f"sparsity {sparsity:g} leaves {max(active, 0)} of {num_experts} experts active",
            why=f"{num_experts} experts of {expert_width} of {intermediate_size} neurons "
            f"({leftover} left over) can reach sparsities from {low:.4g} to {high:.4g}",
            fix=f"choose a sparsity between {low:.4g} and {high:.4g}, or change --num-experts",
        )
    return leftover + active * expert_width


def adaptive_active_neurons(
    scores_LF: Sequence[Tensor], num_experts: int, expert_width: int, sparsity: float
) -> list[int]:
    """A per layer under one global budget: FLAP's adaptive allocation.

    Scores are standardised within each layer, ``z = (score - mean) / std``; the ``L * F * (1 - s)``
    highest z of the whole model stay. The counts per layer become whole slices by largest
    remainders, so that the total is that of the uniform allocation as nearly as slices allow.

    Args:
        scores_LF: centred energies (``weaver.algorithms.energy``) of every layer, L of (F,).
        num_experts: Ne, or 0 for a static method.
        expert_width: N, or 0 for a static method.
        sparsity: s, over all layers together.
    Returns:
        Active neurons of each layer. Every layer keeps between 1 and Ne - 1 active slices, so that
        it routes something; static layers keep between 1 and F neurons.
    Raises:
        ValueError: no layers, or layers of different sizes.
        WeaverError: as ``active_neurons``.
    Source: FLAP, arXiv:2312.11983, adaptive structure search. Deviations: FFN only; rounded to
        slices and clamped.
    """
    sizes = {scores_F.numel() for scores_F in scores_LF}
    if len(sizes) != 1:
        raise ValueError(f"layers need one common size, not {sorted(sizes)}")
    size, layers = sizes.pop(), len(scores_LF)
    active_neurons(size, num_experts, expert_width, sparsity)  # the budget itself must be possible
    if num_experts == 0:
        width, leftover, high = 1, 0, size
    else:
        width, leftover, high = expert_width, size - num_experts * expert_width, num_experts - 1
    budget = layers * size * (1.0 - sparsity)
    wanted = [(kept - leftover) / width for kept in _kept_per_layer(scores_LF, round(budget))]
    slices = round((budget - layers * leftover) / width)
    slices = max(layers, min(slices, layers * high))
    return [leftover + width * count for count in _apportion(wanted, slices, 1, high)]


def _static_neurons(intermediate_size: int, active: int, sparsity: float) -> int:
    if not 1 <= active < intermediate_size:
        raise WeaverError(
            f"sparsity {sparsity:g} leaves {active} of {intermediate_size} neurons active",
            why="a static method must keep at least one neuron and drop at least one",
            fix="--sparsity 0.25",
        )
    return active


def _kept_per_layer(scores_LF: Sequence[Tensor], budget: int) -> list[int]:
    """Neurons of each layer among the ``budget`` highest standardised scores."""
    rows = []
    for scores_F in scores_LF:
        centred_F = scores_F.double() - scores_F.double().mean()
        deviation = centred_F.square().mean().sqrt()
        rows.append(centred_F / deviation if float(deviation) > 0 else centred_F)
    standard_LF = torch.stack(rows)
    kept = torch.argsort(standard_LF.flatten(), descending=True, stable=True)[:budget]
    layer_of = kept // standard_LF.shape[1]
    return [int(count) for count in torch.bincount(layer_of, minlength=len(rows))]


def _apportion(wanted: list[float], total: int, low: int, high: int) -> list[int]:
    """Whole numbers in [low, high] with the given total, near the wanted ones.

    Largest remainders: start from the clamped floors, then give to the layer that is furthest below
    what it wanted (or take from the one furthest above) until the total is reached.
    """
    counts = [min(max(math.floor(value), low), high) for value in wanted]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        open_layers = [i for i, count in enumerate(counts) if low <= count + step <= high]
        nearest = max(open_layers, key=lambda i: step * (wanted[i] - counts[i]))
        counts[nearest] += step
    return counts


def _nearest_divisors(number: int, near: int) -> tuple[int, int]:
    """The divisors of ``number`` (at least 2) next to ``near``, below and above."""
    divisors = [d for d in range(2, number + 1) if number % d == 0]
    above = next(d for d in divisors if d > near)
    below = max((d for d in divisors if d < near), default=above)
    return below, above


def _suggested_multiple(width: int) -> int:
    """The largest power of two up to 64 that a slice of ``width`` neurons can hold, at least 2."""
    return max(2, min(64, 2 ** int(math.log2(width)))) if width >= 2 else 2
