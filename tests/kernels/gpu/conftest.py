"""Problems of the shapes in ``routed_problems``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from routed_problems import Problem

# There is no Triton outside of Linux.
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture
def make_problem(make_ffn: Any, make_routing: Any) -> Callable[..., Problem]:
    """A problem of ``SHAPES`` or ``FEW_TOKENS`` by its name."""
    from routed_problems import FEW_TOKENS, SHAPES, Problem, slots

    def build(
        case: str,
        dtype: torch.dtype = torch.float32,
        *,
        biases: bool = True,
        activation: str = "silu",
    ) -> Problem:
        tokens, hidden, shared, experts, width, top_k, special = {**SHAPES, **FEW_TOKENS}[case]
        stored = make_ffn(
            hidden, shared + experts * width, dtype=dtype, activation=activation, biases=biases
        )
        generator = torch.Generator().manual_seed(7)
        x_TD = torch.randn(tokens, hidden, generator=generator).to(dtype)
        constants_ED = torch.randn(experts, hidden, generator=generator).to(dtype)
        routing = make_routing(tokens, experts, top_k, **special)
        ids_TK, factors_TK = slots(routing, top_k)
        return Problem(
            x_TD,
            # The output bias belongs to the shared expert.
            replace(stored, output_bias_D=None),
            routing,
            ids_TK,
            factors_TK,
            shared,
            constants_ED if biases else None,
        )

    return build
