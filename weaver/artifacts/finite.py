"""NaN and infinities are named where they are first seen, not where something trips over them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weaver.errors import WeaverError

# Values that are looked at together: the check needs copies of them.
_CHUNK = 2**22


class NotFiniteError(WeaverError):
    """A number is NaN or infinite; ``run_pipeline`` adds the stage that saw it first."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; a few megabytes are copied at a time."""
    if not tensor.is_floating_point():
        return True
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_CHUNK))


def require_finite(tensors: Mapping[str, Tensor], where: str, *, why: str, fix: str) -> None:
    """Check tensors by name.

    Args:
        tensors: what is checked.
        where: what they belong to, for the message.
        why, fix: of the error.

    Raises:
        NotFiniteError: naming the first tensor with a value that is NaN or infinite, and how many.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            bad = int((~tensor.isfinite()).sum())
            raise NotFiniteError(
                f"{where}: {bad} of {tensor.numel()} values of {name} are NaN or infinite",
                why=why,
                fix=fix,
            )


def overflow_advice(dtype: torch.dtype) -> tuple[str, str]:
    """``why`` and ``fix`` for activations that are not finite in a dtype."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        return f"float16 ends at {largest:.0f}", "--dtype bfloat16 or --dtype float32"
    return (
        "the weights, which are finite, give it on this text",
        "see whether the dense model works",
    )
