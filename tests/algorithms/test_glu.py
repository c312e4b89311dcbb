"""Parts of a GLU FFN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_forward


@pytest.mark.parametrize("biases", [False, True])
def test_rows_are_views_whose_sum_is_the_whole(biases: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = (normal(12, 8), normal(12, 8), normal(12, 8))
    added = (normal(12), normal(12), normal(8)) if biases else ()
    weights, x_TD = GluWeights(*matrices, "silu", *added), normal(3, 8)
    first, rest = weights.rows(0, 5), weights.rows(5, 12, output_bias=False)
    assert first.gate_FD.data_ptr() == weights.gate_FD.data_ptr()
    assert rest.intermediate_size == 7
    assert rest.output_bias_D is None
    total_TD = glu_forward(x_TD, first) + glu_forward(x_TD, rest)
    torch.testing.assert_close(total_TD, glu_forward(x_TD, weights))
