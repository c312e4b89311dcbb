"""Ridge regression against least squares, hand-worked numbers and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weaver.algorithms.ridge import ShrunkRegression, ridge_fit


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_penalty_by_hand() -> None:
    # x has mean 5 and deviation 2, y = 3 x: the standardised slope is 6, shrunk to 6 / (1 + 1).
    x_TD = torch.tensor([[3.0], [7.0], [3.0], [7.0]])
    weight_ED, bias_E = ridge_fit(x_TD, 3 * x_TD, penalty=1.0)
    assert weight_ED.tolist() == [[pytest.approx(1.5, rel=1e-5)]]
    # The intercept keeps the mean where it was: 15 = 1.5 * 5 + 7.5.
    assert bias_E.tolist() == [pytest.approx(7.5, rel=1e-5)]


def test_the_penalty_is_relative_to_scale_and_number_of_tokens() -> None:
    x_TD, y_TE = _random(50, 3, seed=0), _random(50, 2, seed=1)
    weight_ED, bias_E = ridge_fit(x_TD, y_TE, 0.1)
    scale_D = torch.tensor([1.0, 100.0, 0.01])
    scaled_ED, scaled_E = ridge_fit(x_TD * scale_D, y_TE, 0.1)
    torch.testing.assert_close(scaled_ED * scale_D, weight_ED, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled_E, bias_E, rtol=1e-4, atol=1e-5)
    twice_ED, _ = ridge_fit(x_TD.repeat(2, 1), y_TE.repeat(2, 1), 0.1)
    torch.testing.assert_close(twice_ED, weight_ED, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_without_penalty_it_is_least_squares(inputs: int, outputs: int, seed: int) -> None:
    x_TD = _random(40, inputs, seed=seed) * 2 + 3
    y_TE = _random(40, outputs, seed=seed + 1)
    weight_ED, bias_E = ridge_fit(x_TD, y_TE, 0.0)
    design_TP = torch.cat([x_TD, torch.ones(40, 1)], dim=1)
    expected_PE = torch.linalg.lstsq(design_TP, y_TE).solution
    torch.testing.assert_close(weight_ED.T, expected_PE[:-1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(bias_E, expected_PE[-1], atol=1e-3, rtol=1e-3)


def test_a_large_penalty_leaves_the_mean() -> None:
    y_TE = _random(20, 2, seed=1)
    weight_ED, bias_E = ridge_fit(_random(20, 3, seed=0), y_TE, 1e9)
    torch.testing.assert_close(weight_ED, torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(bias_E, y_TE.mean(0))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_column_changes_nothing(value: float) -> None:
    x_TD, y_TE = _random(300, 2, seed=0), _random(300, 2, seed=1)
    weight_ED, bias_E = ridge_fit(x_TD, y_TE, 0.1)
    wider_TD = torch.cat([x_TD, torch.full((300, 1), value)], dim=1)
    wider_ED, wider_E = ridge_fit(wider_TD, y_TE, 0.1)
    torch.testing.assert_close(wider_ED[:, :2], weight_ED)
    fitted_TE = wider_TD @ wider_ED.T + wider_E
    torch.testing.assert_close(fitted_TE, x_TD @ weight_ED.T + bias_E, atol=1e-4, rtol=1e-4)


def test_a_column_far_from_zero_is_as_good_as_a_centred_one() -> None:
    """Single hidden dimensions of real models are thousands with a deviation of about one."""
    x_TD, y_TE = _random(300, 2, seed=0), _random(300, 1, seed=1)
    weight_ED, _ = ridge_fit(x_TD, y_TE, 0.1)
    moved_ED, _ = ridge_fit(x_TD + torch.tensor([0.0, 4096.0]), y_TE, 0.1)
    torch.testing.assert_close(moved_ED, weight_ED, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="0 inputs for 0 targets"):
        ridge_fit(torch.zeros(0, 2), torch.zeros(0, 1), 0.1)
    with pytest.raises(ValueError, match="3 inputs for 2 targets"):
        ridge_fit(torch.zeros(3, 2), torch.zeros(2, 1), 0.1)


def _regression(z_TP: Tensor, y_TD: Tensor, penalised: int, chunk: int) -> ShrunkRegression:
    regression = ShrunkRegression(z_TP.shape[1], y_TD.shape[1], penalised)
    for z_tP, y_tD in zip(z_TP.split(chunk), y_TD.split(chunk), strict=True):
        regression.add(z_tP, y_tD)
    return regression


def test_shrinkage_by_hand() -> None:
    # G = 4, z y = 8, B0 = 0, and m = 4: B = 8 / (4 + lambda * 4).
    regression = _regression(torch.full((4, 1), 1.0), torch.full((4, 1), 2.0), 1, 4)
    for shrinkage, expected in ((1.0, 1.0), (3.0, 0.5)):
        found_PD = regression.solve(torch.zeros(1, 1), (shrinkage,))
        assert found_PD.item() == pytest.approx(expected, rel=1e-5)
    # From B0 = 4 the distance shrinks: 4 + (8 - 16) / 8.
    found_PD = regression.solve(torch.full((1, 1), 4.0), (1.0,))
    assert found_PD.item() == pytest.approx(3.0, rel=1e-5)


@given(st.integers(0, 2**31), st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_the_limits_are_the_start_and_least_squares(seed: int, free: int) -> None:
    z_TP, y_TD = _random(80, 5, seed=seed), _random(80, 2, seed=seed + 1)
    start_PD = _random(5, 2, seed=seed + 2)
    regression = _regression(z_TP, y_TD, 5 - free, 16)
    least_PD = torch.linalg.lstsq(z_TP, y_TD).solution
    loose_PD = regression.solve(start_PD, (1e-7,))
    # Unpenalised rows are held by a thousandth of their diagonal, for indicators that never vary.
    torch.testing.assert_close(loose_PD, least_PD, atol=0.05 if free else 2e-3, rtol=0)
    tight_PD = regression.solve(start_PD, (1e7,))
    kept = 5 - free
    torch.testing.assert_close(tight_PD[:kept], start_PD[:kept], atol=1e-4, rtol=0)


def test_only_the_penalised_rows_are_shrunk() -> None:
    """A constant beside a pinned coefficient still takes up the mean of what is left."""
    z_TP = torch.cat([_random(4000, 1, seed=0), torch.ones(4000, 1)], dim=1)
    y_TD = torch.full((4000, 1), 5.0)
    found_PD = _regression(z_TP, y_TD, 1, 500).solve(torch.zeros(2, 1), (1e6,))
    assert found_PD.flatten().tolist() == pytest.approx([0.0, 5.0], abs=0.01)


def test_an_indicator_that_never_varies_stays_solvable() -> None:
    z_TP = torch.cat([_random(64, 2, seed=0), torch.zeros(64, 1), torch.ones(64, 2)], dim=1)
    y_TD = _random(64, 2, seed=1) + 3
    start_PD = torch.zeros(5, 2)
    found_PD = _regression(z_TP, y_TD, 2, 16).solve(start_PD, (0.1,))
    assert bool(found_PD.isfinite().all())
    assert found_PD[2].tolist() == [0.0, 0.0]
    error_D = (z_TP @ found_PD - y_TD).mean(0)
    torch.testing.assert_close(error_D, torch.zeros(2), atol=0.02, rtol=0)


@pytest.mark.parametrize(("noise", "expected"), [(0.01, 1e-4), (30.0, 1e4)])
def test_the_held_out_chunks_choose_the_shrinkage(noise: float, expected: float) -> None:
    """The truth lies away from the start; under noise that hides it, the start does better."""
    truth_PD = torch.full((12, 1), 0.2)
    z_TP = _random(160, 12, seed=0)
    y_TD = z_TP @ truth_PD + noise * _random(160, 1, seed=1)
    regression = _regression(z_TP, y_TD, 12, 10)
    chosen_PD = regression.solve(torch.zeros(12, 1), (1e-4, 1e4))
    assert torch.equal(chosen_PD, regression.solve(torch.zeros(12, 1), (expected,)))


def test_every_eighth_chunk_decides() -> None:
    """Chunks 8 and 16 alone say the slope is 0, all others say 1."""
    regression = ShrunkRegression(1, 1, 1)
    for chunk in range(1, 17):
        slope = 0.0 if chunk % 8 == 0 else 1.0
        regression.add(torch.ones(4, 1), torch.full((4, 1), slope))
    loose, tight = 1e-3, 1e3
    chosen_PD = regression.solve(torch.zeros(1, 1), (loose, tight))
    assert torch.equal(chosen_PD, regression.solve(torch.zeros(1, 1), (tight,)))
    # The coefficients themselves come from all chunks: 14 of 16 say 1.
    assert regression.solve(torch.zeros(1, 1), (1e-7,)).item() == pytest.approx(14 / 16, rel=1e-3)


def test_few_chunks_take_the_safest_shrinkage() -> None:
    z_TP, y_TD = _random(70, 3, seed=0), _random(70, 1, seed=1)
    start_PD = torch.zeros(3, 1)
    few = _regression(z_TP, y_TD, 3, 10)
    assert torch.equal(few.solve(start_PD, (0.1, 5.0, 1.0)), few.solve(start_PD, (5.0,)))


def test_a_regression_without_tokens_or_candidates_is_refused() -> None:
    with pytest.raises(ValueError, match="needs tokens and at least one shrinkage"):
        ShrunkRegression(2, 1, 2).solve(torch.zeros(2, 1), (0.1,))
    with pytest.raises(ValueError, match="needs tokens and at least one shrinkage"):
        _regression(torch.ones(3, 2), torch.ones(3, 1), 2, 3).solve(torch.zeros(2, 1), ())


def test_a_weight_of_two_is_a_token_twice() -> None:
    z_TP, y_TD, start_PD = _random(40, 3, seed=0), _random(40, 2, seed=1), torch.zeros(3, 2)
    weighted, repeated = ShrunkRegression(3, 2, 3), ShrunkRegression(3, 2, 3)
    weight_T = torch.ones(40)
    weight_T[:10] = 2.0
    weighted.add(z_TP, y_TD, weight_T)
    repeated.add(torch.cat([z_TP, z_TP[:10]]), torch.cat([y_TD, y_TD[:10]]))
    found_PD = weighted.solve(start_PD, (0.1,))
    torch.testing.assert_close(found_PD, repeated.solve(start_PD, (0.1,)))
