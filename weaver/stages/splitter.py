"""One layer of a partition: its problem, its layout, and what carries tokens past it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.config.sections import PartitionConfig
from weaver.errors import WeaverError
from weaver.methods.allocation import active_neurons, plan_width, pruned_width
from weaver.methods.base import LayerProblem, MethodOptions, MethodSpec
from weaver.methods.layouts import dense_layout
from weaver.models.moe import MoEFeedForward
from weaver.stages.parents import Calibration
from weaver.stages.routing import RoutedLayer, solve_layer


class LayerSplitter:
    """Poses each layer's problem to the method and solves what propagates it.

    Args:
        calibration: model and profiles.
        config: with every default filled in.
        spec: the method.
        options: its options.
        seed: root of the randomness.

    Raises:
        WeaverError: the experts can express neither the width nor the sparsity.
    """

    def __init__(
        self,
        calibration: Calibration,
        config: PartitionConfig,
        spec: MethodSpec[Any],
        options: MethodOptions,
        seed: int,
    ) -> None:
        self.calibration = calibration
        self.checkpoint = calibration.checkpoint
        self.config = config
        self.spec = spec
        self.options = options
        self.seed = seed
        self.num_experts = config.num_experts or 0
        # The expert of each calibration group, once it is known, where the method prunes by groups.
        self.group_experts_G: Tensor | None = None
        neurons, multiple = self.checkpoint.intermediate_size, config.expert_width_multiple
        whole = options.experts_per_token
        if whole is not None:
            _require_experts(self.num_experts, whole)
            self.width = pruned_width(neurons, whole, multiple, config.sparsity)
            self.uniform_neurons = whole * self.width
            return
        self.width = plan_width(neurons, self.num_experts, multiple) if self.num_experts else 0
        self.uniform_neurons = active_neurons(
            neurons, self.num_experts, self.width, config.sparsity
        )

    def split(self, layer: int, profile: LayerProfile, active_neurons: int) -> ExpertLayout:
        """Layout of one layer; one that keeps all its neurons has nothing to route."""
        if active_neurons == self.checkpoint.intermediate_size:
            return dense_layout(active_neurons)
        problem = LayerProblem(
            layer=layer,
            weights=self.checkpoint.ffn(layer, torch.float32),
            profile=profile,
            active_neurons=active_neurons,
            num_experts=self.num_experts,
            expert_width=self.width,
            group_experts_G=self.group_experts_G,
        )
        layout: ExpertLayout = self.spec.partition(problem, self.options, self.generator(layer))
        if self.config.weighting == "softmax" and layout.num_routed_experts:
            # K shares of a sum of 1: with equal scores every factor is 1, as without a softmax.
            layout = replace(layout, weighting="softmax", routed_scaling=float(layout.top_k))
        return layout

    def route(self, layer: int, layout: ExpertLayout, profile: LayerProfile) -> RoutedLayer:
        """Router and compensation of a layer, as its layout's successors see it."""
        assert self.config.propagate is not None
        weights = self.checkpoint.ffn(layer, torch.float32)
        return solve_layer(weights, profile, layout, self.config.propagate, self.generator(layer))

    def converted_ffn(
        self, layer: int, layout: ExpertLayout, routed: RoutedLayer, dtype: torch.dtype
    ) -> MoEFeedForward:
        """The converted FFN of a layer."""
        weights = self.checkpoint.ffn(layer, dtype)
        return MoEFeedForward.convert(weights, layout, routed.router, routed.compensation)

    def generator(self, layer: int) -> torch.Generator:
        """Randomness of one layer, the same whether or not the layers before it ran now."""
        return layer_generator(self.seed, layer)


def _require_experts(num_experts: int, top_k: int) -> None:
    if num_experts < max(2, top_k):
        raise WeaverError(
            f"num_experts={num_experts}, of which a token uses {top_k}",
            why="routing needs at least two experts",
            fix="--num-experts 4",
        )


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """A generator that depends on the seed and the layer only."""
    return torch.Generator().manual_seed(seed * 100_003 + layer)
