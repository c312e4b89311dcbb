"""One FFN of a partition: its problem, its layout, and what carries tokens past it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.conversion.partition_settings import PartitionSettings
from weaver.conversion.routing import RoutedLayer, solve_layer
from weaver.errors import WeaverError
from weaver.methods.allocation import active_neurons, plan_width, pruned_width
from weaver.methods.base import LayerProblem
from weaver.methods.layouts import dense_layout
from weaver.models.moe import MoEFeedForward
from weaver.rundir.inputs import Calibration

# With fewer calibration tokens an expert of a MoE model is not split: co-activations and router
# would be fitted to noise. It is used rarely, so that little is lost.
MIN_EXPERT_TOKENS = 128


class LayerSplitter:
    """Poses each FFN's problem to the method and solves what propagates it.

    Args:
        calibration: model and profiles.
        settings: method, sparsity, experts and router.
        seed: root of the randomness.

    Raises:
        WeaverError: the experts can express neither the width nor the sparsity.
    """

    def __init__(
        self,
        calibration: Calibration,
        settings: PartitionSettings,
        seed: int,
    ) -> None:
        self.calibration = calibration
        self.checkpoint = calibration.checkpoint
        self.settings = settings
        self.config = settings.config
        self.seed = seed
        self.num_experts = settings.config.num_experts or 0
        # The expert of each calibration group, once it is known, where the method prunes by groups.
        self.group_experts_G: Tensor | None = None
        whole = settings.options.experts_per_token
        if whole is not None:
            _require_experts(self.num_experts, whole)
        sites = range(self.checkpoint.num_sites)
        self._sizes = {size: self._plan(size) for size in map(self.checkpoint.neurons, sites)}
        self.width, self.uniform_neurons = self._sizes[self.checkpoint.intermediate_size]

    def _plan(self, neurons: int) -> tuple[int, int]:
        """N, and A at the configured sparsity, of an FFN of some neurons."""
        config, experts = self.config, self.num_experts
        whole = self.settings.options.experts_per_token
        if whole is not None:
            width = pruned_width(neurons, whole, config.expert_width_multiple, config.sparsity)
            return width, whole * width
        width = plan_width(neurons, experts, config.expert_width_multiple) if experts else 0
        return width, active_neurons(neurons, experts, width, config.sparsity)

    def uniform(self, site: int) -> int:
        """Active neurons of an FFN at the configured sparsity."""
        return self._sizes[self.checkpoint.neurons(site)][1]

    def stays_dense(self, site: int, profile: LayerProfile) -> bool:
        """Whether an expert saw too few tokens to be split."""
        return self.checkpoint.sites[site].is_inner and profile.tokens < MIN_EXPERT_TOKENS

    def split(self, site: int, profile: LayerProfile, active_neurons: int) -> ExpertLayout:
        """Layout of one FFN; one that keeps all its neurons has nothing to route.

        An expert of a MoE model that saw fewer than ``MIN_EXPERT_TOKENS`` tokens keeps them all.
        """
        neurons = self.checkpoint.neurons(site)
        if active_neurons == neurons or self.stays_dense(site, profile):
            return dense_layout(neurons)
        problem = LayerProblem(
            layer=self.checkpoint.sites[site].layer,
            weights=self.checkpoint.ffn(site, torch.float32),
            profile=profile,
            active_neurons=active_neurons,
            num_experts=self.num_experts,
            expert_width=self._sizes[neurons][0],
            group_experts_G=self.group_experts_G,
        )
        split = self.settings.spec.partition
        layout: ExpertLayout = split(problem, self.settings.options, self.generator(site))
        if self.config.weighting and layout.num_routed_experts:
            # K shares of a sum of 1: with equal scores every factor is 1, as without a softmax.
            layout = replace(layout, weighting="softmax", routed_scaling=float(layout.top_k))
        return layout

    def route(self, site: int, layout: ExpertLayout, profile: LayerProfile) -> RoutedLayer:
        """Router and compensation of an FFN, as its layout's successors see it."""
        weights = self.checkpoint.ffn(site, torch.float32)
        return solve_layer(weights, profile, layout, self.settings.router, self.generator(site))

    def converted_ffn(
        self, site: int, layout: ExpertLayout, routed: RoutedLayer, dtype: torch.dtype
    ) -> MoEFeedForward:
        """The converted form of an FFN."""
        weights = self.checkpoint.ffn(site, dtype)
        ffn = MoEFeedForward.convert(weights, layout, routed.router, routed.compensation)
        return ffn.to(weights.device)

    def generator(self, site: int) -> torch.Generator:
        """Randomness of one FFN, the same whether or not those before it ran now."""
        return layer_generator(self.seed, site)


def _require_experts(num_experts: int, top_k: int) -> None:
    if num_experts < max(2, top_k):
        raise WeaverError(
            f"num_experts={num_experts}, of which a token uses {top_k}",
            why="routing needs at least two experts",
            fix="--num-experts 4",
        )


def layer_generator(seed: int, site: int) -> torch.Generator:
    """A generator that depends on the seed and the FFN only."""
    return torch.Generator("cpu").manual_seed(seed * 100_003 + site)
