"""The converted FFN inside vLLM: one custom operator per layer, cut between the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward
from weaver.serving.ranks import cut_rows, cut_shape

# One row per neuron, shared ones first, then expert by expert.
ROWS = ("gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias")
# Added to the output once, not once per rank.
ADDED = ("output_bias", "expert_bias")


class ServedFfn(MoEFeedForward):
    """A rank's part of a converted FFN, with the tensor names of the converted model.

    ``y = sum_r y_r``: every rank computes the selected experts with its neurons, and the sum over
    ranks is the layer's output; the constants are the first rank's.

    Args:
        shape: of the whole layer.
        hidden_size: D.
        activation: weaver's name of the GLU's activation.
        name: of the layer in the model, by which the operator finds it.
        config: of vLLM.
    """

    def __init__(
        self, shape: LayerShape, hidden_size: int, activation: str, name: str, config: VllmConfig
    ) -> None:
        self.rank = get_tensor_model_parallel_rank()
        self.ranks = get_tensor_model_parallel_world_size()
        device = torch.empty(0).device
        with torch.device("meta"):
            super().__init__(cut_shape(shape, self.rank, self.ranks), hidden_size, activation)
        self.to_empty(device=device).requires_grad_(False)
        self.whole, self.name = shape, name
        config.compilation_config.static_forward_context[name] = self
        for key, parameter in self.named_parameters(recurse=False):
            if key in ROWS or key in ADDED:
                parameter.weight_loader = self._loader(key)  # type: ignore[attr-defined]

    def _loader(self, key: str) -> Any:
        def load(parameter: nn.Parameter, stored: Tensor) -> None:
            if key in ROWS:
                stored = cut_rows(stored, self.whole, self.rank, self.ranks)
            elif self.rank > 0:
                stored = torch.zeros_like(stored)
            parameter.data.copy_(stored)

        return load

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = torch.ops.vllm.weaver_ffn(hidden_states, self.name)
        return output if self.ranks == 1 else tensor_model_parallel_all_reduce(output)


def _weaver_ffn(hidden_states: Tensor, layer: str) -> Tensor:
    ffn: ServedFfn = get_forward_context().no_compile_layers[layer]
    return ffn._compute(hidden_states)


def _weaver_ffn_fake(hidden_states: Tensor, layer: str) -> Tensor:
    del layer
    return torch.empty_like(hidden_states)


# One node in the graphs that vLLM compiles: which kernel runs is decided inside, at every call.
direct_register_custom_op("weaver_ffn", _weaver_ffn, fake_impl=_weaver_ffn_fake)
