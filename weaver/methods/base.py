"""Types of a conversion method: its options, one layer's problem, and its row in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.types import ExpertLayout, LayerProfile, Router, Selection


class MethodOptions(BaseModel):
    """Options of one method; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def selects(self) -> Selection:
        """How the layouts that these options make select experts."""
        return "top-k"

    @property
    def experts_per_token(self) -> int | None:
        """K of experts that each stand for the whole FFN; None where they are slices of it."""
        return None


class GroupOptions(MethodOptions):
    """Options of a method that prunes the whole FFN once per expert, each for some groups of text.

    The calibration has to keep its groups apart; which of them belong together is measured before
    the first layer is split.

    Args:
        top_k: K, experts per token; the more there are, the narrower each is.
        affinity_windows: windows of each group's text on which pruned models are measured.
    """

    top_k: int = Field(1, ge=1)
    affinity_windows: int = Field(4, ge=1)

    @property
    def experts_per_token(self) -> int:
        return self.top_k


OptionsT = TypeVar("OptionsT", bound=MethodOptions)


@dataclass(frozen=True)
class LayerProblem:
    """One layer to be split: its weights, its statistics, and how much may stay active.

    Args:
        layer: index of the decoder layer.
        weights: float32 weights of the dense FFN.
        profile: statistics of the calibration tokens at this layer.
        active_neurons: S + K * N that the layout must reach, a multiple of ``expert_width`` plus
            the neurons left over when F is not a multiple of it.
        num_experts: Ne, slices of the FFN, shared ones counted in; 0 for static methods; E where
            experts are prunings of the whole FFN.
        expert_width: N, neurons per slice; 0 for static methods.
        group_experts_G: the expert of each calibration group, int64, (G,); only for methods that
            prune by groups.
    """

    layer: int
    weights: GluWeights
    profile: LayerProfile
    active_neurons: int
    num_experts: int
    expert_width: int
    group_experts_G: Tensor | None = None

    @property
    def leftover_neurons(self) -> int:
        """F - Ne * N: neurons no slice holds; they join the shared expert."""
        return self.weights.intermediate_size - self.num_experts * self.expert_width

    @property
    def active_experts(self) -> int:
        """Slices active per token, shared ones counted in: (A - leftover) / N."""
        return (self.active_neurons - self.leftover_neurons) // self.expert_width


PartitionFunction = Callable[[LayerProblem, OptionsT, torch.Generator], ExpertLayout]
SharedScores = Callable[[LayerProblem, OptionsT], Tensor]
RouterFunction = Callable[[GluWeights, LayerProfile, ExpertLayout, torch.Generator], Router]


@dataclass(frozen=True)
class MethodSpec(Generic[OptionsT]):
    """One row of the method table.

    Args:
        name: what ``--method`` takes.
        summary: one line for help and README.
        source: arXiv id or where the method comes from.
        partition: the pure function.
        shared_scores: the score of every neuron, (F,), by which ``partition`` ranks neurons for the
            shared (static: the kept) part, highest first; None where it chooses them otherwise.
        options: the type of its options, whose defaults are the paper's.
        num_experts: default Ne; None for a static method, which has no routed experts.
        router: default router; None for a static method.
        sequential: whether the paper carves a layer on the output of the converted ones before it.
        refit: whether the down projection is re-solved by default.
        constants: whether the mean output of what is skipped is supplied by default, beyond what
            the method's layout itself supplies.
        allocation: how active neurons are divided among the layers by default.
    """

    name: str
    summary: str
    source: str
    partition: PartitionFunction[OptionsT]
    shared_scores: SharedScores[OptionsT] | None
    options: type[OptionsT]
    num_experts: int | None
    router: str | None
    sequential: bool
    refit: bool = False
    constants: bool = False
    allocation: Literal["uniform", "adaptive", "fisher"] = "uniform"

    @property
    def prunes_groups(self) -> bool:
        """Whether experts are prunings of the whole FFN, which overlap; see ``GroupOptions``."""
        return issubclass(self.options, GroupOptions)

    @property
    def is_static(self) -> bool:
        return self.num_experts is None
