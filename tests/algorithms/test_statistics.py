"""Streaming statistics: hand-worked numbers, and no trace of how the stream was cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weaver.algorithms.energy import pooled_moments
from weaver.algorithms.glu import GluWeights, gate_activation, glu_hidden
from weaver.algorithms.statistics import (
    LayerStatistics,
    Moments,
    activation_rates,
    error_weights,
    input_rows,
    marker_neurons,
    normalised,
    sample_positions,
)
from weaver.artifacts.types import LayerProfile

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weights(neurons: int = 8, hidden: int = 4, activation: str = "silu") -> GluWeights:
    gate_FD, up_FD, down_FD = torch.randn(3, neurons, hidden, generator=seeded(7))
    return GluWeights(gate_FD, up_FD, down_FD, activation)


def collect(x_TD: Tensor, ids_T: Tensor, weights: GluWeights, cuts: list[int]) -> LayerProfile:
    samples = int(ids_T.max()) + 1
    statistics = LayerStatistics(weights, samples, 3, torch.tensor([0, 3, 7, 11]))
    edges = [0, *sorted(cuts), x_TD.shape[0]]
    for start, end in itertools.pairwise(edges):
        statistics.update(x_TD[start:end], ids_T[start:end])
    return statistics.finish(torch.arange(samples) % 2)


def test_activation_rates_by_hand() -> None:
    # Neuron 0 marks 2 of 4 tokens, neuron 1 all of them, neuron 2 one, neuron 3 one, neuron 4 none.
    markers_TA = torch.tensor([[0, 1], [1, 2], [1, 0], [3, 1]], dtype=torch.int32)
    rates_F = activation_rates(markers_TA, 5)
    assert rates_F.tolist() == [0.5, 1.0, 0.25, 0.25, 0.0]
    assert float(rates_F.sum()) == 2.0


def test_activation_rates_rejects_bad_ids() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        activation_rates(torch.empty(0, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        activation_rates(torch.tensor([[4]]), 4)
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        activation_rates(torch.tensor([[-1]]), 4)


def test_normalised_rows_by_hand() -> None:
    weights = GluWeights(
        gate_FD=torch.tensor([[3.0, 4.0]]),
        up_FD=torch.tensor([[0.0, -2.0]]),
        down_FD=torch.tensor([[5.0, 5.0]]),
        activation="silu",
        gate_bias_F=torch.ones(1),
    )
    unit = normalised(weights)
    torch.testing.assert_close(unit.gate_FD, torch.tensor([[0.6, 0.8]]))
    assert unit.up_FD.tolist() == [[0.0, -1.0]]
    assert unit.down_FD.tolist() == [[5.0, 5.0]]
    assert unit.gate_bias_F is None


def test_markers_ignore_the_size_of_weights_and_inputs() -> None:
    # relu: on x = (1, 0) the normalised |h| are 1, 0.6 * 0.6 = 0.36, 0 and 0.8 * 0.8 = 0.64 (up
    # negative). Raw h would put neuron 1 first: its rows are 100 times longer.
    rows_FD = torch.tensor([[1.0, 0.0], [60.0, 80.0], [0.0, 1.0], [0.8, 0.6]])
    up_FD = rows_FD * torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    unit = normalised(GluWeights(rows_FD, up_FD, rows_FD, "relu"))
    markers_TA = marker_neurons(torch.tensor([[1.0, 0.0], [50.0, 0.0]]), unit, 3)
    assert markers_TA.tolist() == [[0, 3, 1], [0, 3, 1]]
    assert markers_TA.dtype == torch.int32
    with pytest.raises(ValueError, match=r"activation_top_k=5 outside 1\.\.4"):
        marker_neurons(torch.ones(1, 2), unit, 5)


def test_profile_by_hand() -> None:
    # One neuron, relu, D = 1: gate 1, up 2. x = 1, -1, 3 | 2 gives g = 1, 0, 3 | 2 and
    # h = 2, 0, 18 | 8: mean 7, variance (25 + 49 + 121 + 1) / 4 = 49.
    weights = GluWeights(torch.ones(1, 1), 2 * torch.ones(1, 1), torch.ones(1, 1), "relu")
    statistics = LayerStatistics(weights, 2, 1, torch.tensor([1, 3]))
    statistics.update(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    statistics.update(torch.tensor([[3.0], [2.0]]), torch.tensor([0, 1]))
    profile = statistics.finish(torch.tensor([4, 5]))
    torch.testing.assert_close(profile.sample_gate_mean_MF, torch.tensor([[4 / 3], [2.0]]))
    assert profile.sample_tokens_M.tolist() == [3, 1]
    assert profile.sample_groups_M.tolist() == [4, 5]
    assert float(profile.hidden_mean_F) == 7.0
    assert float(profile.hidden_variance_F) == 49.0
    assert float(profile.hidden_second_moment_F) == 98.0
    assert float(profile.gate_abs_mean_F) == 1.5
    assert profile.ffn_inputs_ND.tolist() == [[-1.0], [2.0]]
    assert profile.marker_neurons_TA.tolist() == [[0]] * 4
    assert profile.tokens == 4


def test_signed_and_absolute_means_differ() -> None:
    # silu(-1) is negative: the signed mean is silu(-1), the absolute one -silu(-1).
    weights = GluWeights(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), "silu")
    statistics = LayerStatistics(weights, 1, 1, torch.tensor([], dtype=torch.int64))
    statistics.update(-torch.ones(2, 1), torch.zeros(2, dtype=torch.int64))
    profile = statistics.finish(torch.zeros(1, dtype=torch.int64))
    silu = -1 / (1 + math.e)
    assert float(profile.sample_gate_mean_MF) == pytest.approx(silu, rel=1e-6)
    assert float(profile.sample_gate_abs_mean_MF) == pytest.approx(-silu, rel=1e-6)
    assert profile.ffn_inputs_ND.shape == (0, 1)


def test_profile_matches_the_definitions() -> None:
    weights = random_weights()
    x_TD = torch.randn(12, 4, generator=seeded())
    ids_T = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0, 2])
    profile = collect(x_TD, ids_T, weights, [5])
    gate_TF, hidden_TF = gate_activation(x_TD, weights), glu_hidden(x_TD, weights)
    for sample in range(3):
        rows_tF = gate_TF[ids_T == sample]
        torch.testing.assert_close(profile.sample_gate_mean_MF[sample], rows_tF.mean(0))
        torch.testing.assert_close(profile.sample_gate_abs_mean_MF[sample], rows_tF.abs().mean(0))
    torch.testing.assert_close(profile.hidden_mean_F, hidden_TF.mean(0))
    torch.testing.assert_close(profile.hidden_variance_F, hidden_TF.var(0, correction=0))
    torch.testing.assert_close(profile.gate_abs_mean_F, gate_TF.abs().mean(0))
    assert torch.equal(profile.ffn_inputs_ND, x_TD[[0, 3, 7, 11]])


@given(st.lists(st.integers(1, 11), unique=True, max_size=6), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_result_does_not_depend_on_the_batches(cuts: list[int], seed: int) -> None:
    x_TD = torch.randn(12, 4, generator=seeded(seed))
    ids_T = torch.randint(0, 3, (12,), generator=seeded(seed))
    ids_T[:3] = torch.arange(3)
    whole = collect(x_TD, ids_T, random_weights(), []).tensors()
    cut = collect(x_TD, ids_T, random_weights(), cuts).tensors()
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value)


def test_variance_survives_a_large_mean() -> None:
    # h alternates between 1000 and 1001: variance 0.25. The naive E[h^2] - E[h]^2 in float32 gives
    # 0 or worse, the difference being in the seventh digit of 10^6.
    weights = GluWeights(torch.ones(1, 2), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), "relu")
    x_TD = torch.tensor([[0.0, 1000.0**0.5], [0.0, 1001.0**0.5]]).repeat(500, 1)
    statistics = LayerStatistics(weights, 1, 1, torch.tensor([0]))
    for x_tD in x_TD.split(64):
        statistics.update(x_tD, torch.zeros(x_tD.shape[0], dtype=torch.int64))
    profile = statistics.finish(torch.zeros(1, dtype=torch.int64))
    assert float(profile.hidden_variance_F) == pytest.approx(0.25, rel=1e-3)


def test_inputs_keep_their_dtype() -> None:
    statistics = LayerStatistics(random_weights(), 1, 2, torch.tensor([1]))
    statistics.update(torch.ones(3, 4, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64))
    assert statistics.finish(torch.zeros(1)).ffn_inputs_ND.dtype == torch.bfloat16


def test_update_and_finish_reject_misuse() -> None:
    statistics = LayerStatistics(random_weights(), 2, 2, torch.tensor([0]))
    with pytest.raises(ValueError, match="3 tokens with 2 sample ids"):
        statistics.update(torch.ones(3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        statistics.update(torch.ones(1, 4), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"no tokens in samples \[0, 1\]"):
        statistics.finish(torch.zeros(2))
    statistics.update(torch.ones(1, 4), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"no tokens in samples \[0\]"):
        statistics.finish(torch.zeros(2))
    with pytest.raises(ValueError, match="3 groups for 2 samples"):
        statistics.finish(torch.zeros(3))


def test_input_rows_by_hand() -> None:
    assert input_rows(32, 4096, torch.bfloat16) == 3906  # 32e6 / 8192
    assert input_rows(1, 1000, torch.float32) == 250
    assert input_rows(0.001, 4096, torch.float32) == 1


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_sample_positions_are_one_per_stretch(tokens: int, rows: int, seed: int) -> None:
    positions = sample_positions(tokens, rows, seeded(seed))
    assert positions.numel() == min(tokens, rows)
    assert torch.equal(positions, sample_positions(tokens, rows, seeded(seed)))
    edges = torch.arange(positions.numel() + 1) * tokens // positions.numel()
    assert bool(((edges[:-1] <= positions) & (positions < edges[1:])).all())


def test_moments_by_group_by_hand() -> None:
    """h = 2 x^2: 2, 18 and 8 of the first group, 0 of the second; the third was not seen."""
    weights = GluWeights(torch.ones(1, 1), 2 * torch.ones(1, 1), torch.ones(1, 1), "relu")
    groups_M = torch.tensor([1, 0, 0])
    statistics = LayerStatistics(weights, 3, 1, torch.tensor([0]), groups_M, num_groups=3)
    statistics.update(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    statistics.update(torch.tensor([[3.0], [2.0]]), torch.tensor([1, 2]))
    profile = statistics.finish(groups_M)
    assert profile.group_tokens_G is not None
    assert profile.group_hidden_mean_GF is not None
    assert profile.group_hidden_variance_GF is not None
    assert profile.group_tokens_G.tolist() == [3, 1, 0]
    torch.testing.assert_close(profile.group_hidden_mean_GF, torch.tensor([[28 / 3], [0.0], [0.0]]))
    # (4 + 324 + 64) / 3 - (28 / 3)^2
    variance_GF = torch.tensor([[392 / 9], [0.0], [0.0]])
    torch.testing.assert_close(profile.group_hidden_variance_GF, variance_GF)
    plain = LayerStatistics(weights, 1, 1, torch.tensor([0]))
    plain.update(torch.ones(1, 1), torch.tensor([0]))
    assert plain.finish(torch.tensor([0])).group_tokens_G is None


def test_groups_together_are_all_tokens() -> None:
    weights = random_weights(neurons=6)
    x_TD = torch.randn(3000, 4, generator=seeded()) + 0.5
    ids_T = torch.arange(3000) // 500
    groups_M = torch.tensor([0, 1, 2, 0, 1, 0])
    statistics = LayerStatistics(weights, 6, 1, torch.tensor([0]), groups_M, num_groups=3)
    statistics.update(x_TD, ids_T)
    profile = statistics.finish(groups_M)
    assert profile.group_tokens_G is not None
    assert profile.group_hidden_mean_GF is not None
    assert profile.group_hidden_variance_GF is not None
    mean_F, variance_F = pooled_moments(
        profile.group_hidden_mean_GF, profile.group_hidden_variance_GF, profile.group_tokens_G
    )
    torch.testing.assert_close(mean_F, profile.hidden_mean_F)
    torch.testing.assert_close(variance_F, profile.hidden_variance_F)


def test_errors_count_relative_to_the_size_of_the_output() -> None:
    y_TD = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    # Mean squares 12.5, 0.00125 and 0, and the norm's 1e-6.
    expected = [1 / (12.5 + 1e-6), 1 / (0.00125 + 1e-6), 1e6]
    assert error_weights(y_TD).tolist() == pytest.approx(expected)


@given(st.lists(st.integers(1, 4), min_size=2, max_size=12), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_a_weight_is_as_good_as_a_repetition(weights: list[int], seed: int) -> None:
    hidden_TF = torch.randn(len(weights), 3, generator=seeded(seed))
    weight_T = torch.tensor(weights)
    weighted, repeated = Moments(3, CPU), Moments(3, CPU)
    half = len(weights) // 2
    weighted.add(hidden_TF[:half], weight_T[:half].float())
    weighted.add(hidden_TF[half:], weight_T[half:].float())
    repeated.add(hidden_TF.repeat_interleave(weight_T, dim=0))
    torch.testing.assert_close(weighted.mean_F, repeated.mean_F, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weighted.variance_F, repeated.variance_F, atol=1e-5, rtol=1e-4)


def test_a_normalised_output_weights_moments_and_inputs() -> None:
    weights = replace(random_weights(), normed_output=True)
    x_TD = torch.randn(12, 4, generator=seeded(1))
    statistics = LayerStatistics(weights, 1, 2, torch.tensor([1, 5, 7]), window=6)
    statistics.update(x_TD, torch.zeros(12, dtype=torch.int64))
    profile = statistics.finish(torch.zeros(1))
    hidden_TF = glu_hidden(x_TD, weights)
    weight_T = error_weights(hidden_TF @ weights.down_FD)
    torch.testing.assert_close(profile.hidden_mean_F, weight_T @ hidden_TF / weight_T.sum())
    assert profile.input_weights_N is not None
    torch.testing.assert_close(profile.input_weights_N, weight_T[[1, 5, 7]])
    assert profile.input_places_N is not None
    assert profile.input_places_N.tolist() == [1, 5, 1]
