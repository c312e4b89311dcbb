"""How much errors in the FFNs' outputs cost: what a calibration keeps of its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weaver.artifacts.record import TensorRecord


@dataclass(frozen=True)
class Sensitivities(TensorRecord):
    """Prediction of a token's sensitivity from its FFN input, layer by layer.

    ``log s_t ~ x_t . direction + offset``; see ``weaver.algorithms.sensitivity.fit_sensitivity``.

    Args:
        direction_LD: float32, (L, D).
        offset_L: float32, (L,).
    """

    direction_LD: Tensor
    offset_L: Tensor
