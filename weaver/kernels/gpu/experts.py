"""The routed experts as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Experts:
    """Row slices of the stored matrices, R = E N rows, with columns next to each other.

    Args:
        gate_RD: gate projections, (R, D).
        up_RD: up projections, (R, D).
        down_RD: down projections, (R, D).
        num_experts: E.
        activation: a key of ``ACTIVATIONS``.
        gate_bias_R: biases of the gate projections, (R,), or None.
        up_bias_R: biases of the up projections, (R,), or None.
        expert_bias_ED: constants of the experts, (E, D), or None.
    """

    gate_RD: Tensor
    up_RD: Tensor
    down_RD: Tensor
    num_experts: int
    activation: str
    gate_bias_R: Tensor | None = None
    up_bias_R: Tensor | None = None
    expert_bias_ED: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        return self.gate_RD.shape[1]

    @property
    def width(self) -> int:
        """N."""
        return self.gate_RD.shape[0] // self.num_experts

    def sizes(self) -> dict[str, int]:
        """E, D and N under the names of the kernels' arguments."""
        return {
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
            "width": self.width,
        }

    def gate_up_arguments(self) -> dict[str, Any]:
        """Return the arguments of the kernels that compute ``h``: gate, up, strides, activation."""
        return {
            "gate_RD": self.gate_RD,
            "up_RD": self.up_RD,
            "gate_bias_R": self.gate_bias_R,
            "up_bias_R": self.up_bias_R,
            "stride_gate": self.gate_RD.stride(0),
            "stride_up": self.up_RD.stride(0),
            "ACTIVATION": self.activation,
        }

    def down_arguments(self) -> dict[str, Any]:
        """Return the arguments of the kernels that apply the down projection: matrix and stride."""
        return {"down_RD": self.down_RD, "stride_down": self.down_RD.stride(0)}
