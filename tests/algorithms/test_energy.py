"""FLAP's score and bias by hand."""

from __future__ import annotations

import torch

from weaver.algorithms.energy import centred_energy, mean_output

DOWN_FD = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])


def test_centred_energy_by_hand() -> None:
    # 2 * 25, 7 * 1, 0.5 * 4
    assert centred_energy(torch.tensor([2.0, 7.0, 0.5]), DOWN_FD).tolist() == [50.0, 7.0, 2.0]


def test_mean_output_by_hand() -> None:
    # 10 * (3, 4) + 5 * (0, 2)
    mean_F = torch.tensor([10.0, 99.0, 5.0])
    assert mean_output(mean_F, DOWN_FD, torch.tensor([0, 2])).tolist() == [30.0, 50.0]
