"""FLAP's score and bias by hand."""

from __future__ import annotations

import pytest
import torch

from weaver.algorithms.energy import centred_energy, mean_output, pooled_moments

DOWN_FD = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])


def test_centred_energy_by_hand() -> None:
    # 2 * 25, 7 * 1, 0.5 * 4
    assert centred_energy(torch.tensor([2.0, 7.0, 0.5]), DOWN_FD).tolist() == [50.0, 7.0, 2.0]


def test_mean_output_by_hand() -> None:
    # 10 * (3, 4) + 5 * (0, 2)
    mean_F = torch.tensor([10.0, 99.0, 5.0])
    assert mean_output(mean_F, DOWN_FD, torch.tensor([0, 2])).tolist() == [30.0, 50.0]


def test_pooled_moments_by_hand() -> None:
    # Values 1, 3 and 10 of the first neuron: mean 14 / 3, variance 110 / 3 - 196 / 9 = 134 / 9.
    # Groups (1, 3) and (10): means 2 and 10, variances 1 and 0.
    mean_F, variance_F = pooled_moments(
        torch.tensor([[2.0, 5.0], [10.0, 5.0]]),
        torch.tensor([[1.0, 0.25], [0.0, 1.0]]),
        torch.tensor([2, 1]),
    )
    torch.testing.assert_close(mean_F, torch.tensor([14 / 3, 5.0]))
    torch.testing.assert_close(variance_F, torch.tensor([134 / 9, 0.5]))
    with pytest.raises(ValueError, match="no tokens in these groups"):
        pooled_moments(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
