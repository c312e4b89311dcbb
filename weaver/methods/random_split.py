"""Random split: the baseline that any clustering has to beat."""

from __future__ import annotations

import torch
from pydantic import Field

from weaver.artifacts.types import ExpertLayout
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.methods.layouts import expert_layout, routed_top_k


class RandomOptions(MethodOptions):
    """Options of the random split.

    Args:
        shared_experts: slices of random neurons that are always active.
    """

    shared_experts: int = Field(0, ge=0)


def partition(
    problem: LayerProblem, options: RandomOptions, generator: torch.Generator
) -> ExpertLayout:
    """Shuffle the neurons and cut them into shared neurons and equal experts.

    Args:
        problem: the layer.
        options: how many slices are shared; leftover neurons are shared too.
        generator: source of the permutation.
    Raises:
        WeaverError: no routed expert would be active, or all of them.
    Source: LLaMA-MoE, arXiv:2406.16554, "Independent (Random)".
    """
    top_k = routed_top_k(problem, options.shared_experts)
    width = problem.expert_width
    order_F = torch.randperm(
        problem.weights.intermediate_size, generator=generator, device=generator.device
    )
    shared = problem.leftover_neurons + options.shared_experts * width
    routed_n = order_F[shared:]
    owner_n = torch.arange(routed_n.numel(), device=routed_n.device) // width
    return expert_layout(problem, order_F[:shared], routed_n, owner_n, top_k)
