"""Gradients that two ways to compute one thing give."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]
) -> None:
    """Every parameter has a gradient that is not zero, and they differ by rounding alone.

    Sums in another order differ by some units in the last place of their largest terms, also where
    these nearly cancel: the limit is 32 of those of the tensor's largest entry. A router computes
    in float32 whatever its dtype, the rest in its own.
    """
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        other = found[name]
        assert gradient is not None, name
        assert other is not None, name
        largest = float(gradient.abs().max())
        assert largest > 0, name
        dtype = torch.float32 if name.startswith("router.") else gradient.dtype
        limit = 32 * torch.finfo(dtype).eps * largest
        torch.testing.assert_close(other, gradient, rtol=0, atol=limit)
