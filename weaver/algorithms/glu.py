"""The dense GLU feed-forward layer: the definition that every conversion starts from.

Shape legend used all over weaver: T tokens, D hidden size, F intermediate size (neurons of the
dense FFN), E routed experts, N neurons per expert, S shared neurons, K routed experts active per
token, L layers, M calibration samples, G groups (tasks or domains), W windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True)
class GluWeights:
    """Weights of one GLU FFN with neuron j as row j of all three matrices.

    ``g = act(x gate^T + gate_bias)``, ``u = x up^T + up_bias``, ``h = g * u``,
    ``y = h down + output_bias``. Note that ``down_FD`` is the transpose of the ``down_proj.weight``
    of HF models, so that a neuron is one row everywhere.

    Args:
        gate_FD: gate projection, (F, D).
        up_FD: up projection, (F, D).
        down_FD: down projection, (F, D).
        activation: a key of ``ACTIVATIONS``.
        gate_bias_F: bias of the gate projection, (F,), or None.
        up_bias_F: bias of the up projection, (F,), or None.
        output_bias_D: bias of the down projection, (D,), or None.
        normed_output: the decoder layer normalises y before it adds it to the hidden states
            (Gemma 2 and 3, OLMo 2), so that errors count relative to the size of y.
    """

    gate_FD: Tensor
    up_FD: Tensor
    down_FD: Tensor
    activation: str
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    output_bias_D: Tensor | None = None
    normed_output: bool = False

    @property
    def intermediate_size(self) -> int:
        return self.gate_FD.shape[0]

    @property
    def device(self) -> torch.device:
        return self.gate_FD.device

    @property
    def hidden_size(self) -> int:
        return self.gate_FD.shape[1]

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> GluWeights:
        """The same weights in another dtype, and on a device; by default where they are."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, dtype)

        return replace(
            self,
            gate_FD=self.gate_FD.to(device, dtype),
            up_FD=self.up_FD.to(device, dtype),
            down_FD=self.down_FD.to(device, dtype),
            gate_bias_F=cast(self.gate_bias_F),
            up_bias_F=cast(self.up_bias_F),
            output_bias_D=cast(self.output_bias_D),
        )

    def select(self, neurons: Tensor) -> GluWeights:
        """The FFN restricted to (or permuted by) a list of neuron ids, (n,)."""

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[neurons]

        return replace(
            self,
            gate_FD=self.gate_FD[neurons],
            up_FD=self.up_FD[neurons],
            down_FD=self.down_FD[neurons],
            gate_bias_F=take(self.gate_bias_F),
            up_bias_F=take(self.up_bias_F),
        )

    def rows(self, begin: int, end: int, *, output_bias: bool = True) -> GluWeights:
        """Neurons ``begin:end`` as views, with the output bias or without it."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[begin:end]

        return replace(
            self,
            gate_FD=self.gate_FD[begin:end],
            up_FD=self.up_FD[begin:end],
            down_FD=self.down_FD[begin:end],
            gate_bias_F=some(self.gate_bias_F),
            up_bias_F=some(self.up_bias_F),
            output_bias_D=self.output_bias_D if output_bias else None,
        )


def gate_activation(x_TD: Tensor, weights: GluWeights) -> Tensor:
    """Gate activations ``g = act(x gate^T + gate_bias)``, (T, F)."""
    pre_TF = functional.linear(x_TD, weights.gate_FD, weights.gate_bias_F)
    return ACTIVATIONS[weights.activation](pre_TF)


def glu_hidden(x_TD: Tensor, weights: GluWeights) -> Tensor:
    """Neuron activations ``h = act(x gate^T) * (x up^T)``, (T, F)."""
    return gate_activation(x_TD, weights) * functional.linear(
        x_TD, weights.up_FD, weights.up_bias_F
    )


def glu_forward(x_TD: Tensor, weights: GluWeights) -> Tensor:
    """Output of the dense FFN, ``y = h down + output_bias``, (T, D)."""
    y_TD = glu_hidden(x_TD, weights) @ weights.down_FD
    return y_TD if weights.output_bias_D is None else y_TD + weights.output_bias_D
