"""KL and errors by position."""

from __future__ import annotations

import pytest
import torch

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.algorithms.statistics import LayerStatistics
from weaver.artifacts.types import LayerProfile
from weaver.evaluation.positions import error_by_position, kl_by_position
from weaver.methods.layouts import dense_layout
from weaver.models.moe import MoEFeedForward


def test_ranges_are_counted_from_one_and_end_with_the_window() -> None:
    kl_WT = torch.arange(200.0).expand(3, -1)
    found = [(part.first, part.last, part.kl, part.tokens) for part in kl_by_position(kl_WT)]
    assert found == [
        (1, 1, 0.0, 3),
        (2, 2, 1.0, 3),
        (3, 16, 8.5, 42),
        (17, 128, 71.5, 336),
        (129, None, 163.5, 216),
    ]
    assert [part.first for part in kl_by_position(kl_WT[:, :16])] == [1, 2, 3]


def layer(window: int | None) -> tuple[GluWeights, LayerProfile]:
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD, down_FD = torch.randn(3, 12, 6, generator=generator)
    weights = GluWeights(gate_FD, up_FD, down_FD, "silu")
    statistics = LayerStatistics(weights, 1, 2, torch.arange(60), window=window)
    x_TD = torch.randn(60, 6, generator=generator)
    statistics.update(x_TD, torch.zeros(60, dtype=torch.int64))
    return weights, statistics.finish(torch.zeros(1, dtype=torch.int64))


def test_errors_are_those_of_the_inputs_at_a_place() -> None:
    weights, profile = layer(20)
    ffn = MoEFeedForward.convert(weights, dense_layout(12), None)
    exact = {first: error for first, _, error in error_by_position(profile, weights, ffn)}
    assert exact == pytest.approx(dict.fromkeys((1, 2, 3, 17), 0.0), abs=1e-9)
    # Twice the output at the first place of every window alone.
    first_ND = profile.ffn_inputs_ND[::20]

    def doubled(x_TD: torch.Tensor) -> torch.Tensor:
        twice_T = (x_TD[:, None] == first_ND).all(-1).any(-1)
        return glu_forward(x_TD, weights) * (1 + twice_T.float())[:, None]

    ffn.forward = doubled  # type: ignore[method-assign, assignment]
    found = {first: error for first, _, error in error_by_position(profile, weights, ffn)}
    assert found[1] == pytest.approx(1.0)
    assert max(found[2], found[3], found[17]) < 1e-9


def test_without_places_there_are_no_errors_by_position() -> None:
    weights, profile = layer(None)
    ffn = MoEFeedForward.convert(weights, dense_layout(12), None)
    assert list(error_by_position(profile, weights, ffn)) == []
