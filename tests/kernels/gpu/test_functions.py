"""Activations and their slopes, also far from zero, against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from weaver.algorithms.glu import ACTIVATIONS
from weaver.kernels.gpu.functions import activate, activation_slope
from weaver.kernels.gpu.interpret import interpret


@triton.jit  # type: ignore[untyped-decorator]
def both_kernel(x_ptr: Any, y_ptr: Any, slope_ptr: Any, ACTIVATION: tl.constexpr) -> None:
    at = tl.arange(0, 64)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, activate(x, ACTIVATION))
    tl.store(slope_ptr + at, activation_slope(x, ACTIVATION))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes(activation: str) -> None:
    x = torch.cat([torch.linspace(-8, 8, 57), torch.tensor([-1e3, -90, -30, 0, 30, 90, 1e3])])
    y, slope = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    arguments = {"x_ptr": x, "y_ptr": y, "slope_ptr": slope, "ACTIVATION": activation}
    interpret(both_kernel, (1,), arguments)
    exact = x.double().requires_grad_()
    expected = ACTIVATIONS[activation](exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), expected_slope, rtol=2e-6, atol=1e-6)
