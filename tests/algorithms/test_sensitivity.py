"""The sensitivity of a token, predicted from its FFN input; and the predicted KL by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from weaver.algorithms.sensitivity import fit_sensitivity, predicted_kl, predicted_sensitivity

TOKENS, SIZE = 4000, 6
PLACES_T = torch.arange(TOKENS) % 100


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_predicted_kl_by_hand() -> None:
    # g . e is 1 * 3 + 2 * -1 = 1 and 3 * 1 = 3: half of (1 + 9) / 2.
    error_TD = torch.tensor([[3.0, -1.0], [0.0, 1.0]])
    gradient_TD = torch.tensor([[1.0, 2.0], [5.0, 3.0]])
    assert predicted_kl(error_TD, gradient_TD) == 2.5
    assert predicted_kl(error_TD.bfloat16(), gradient_TD.bfloat16()) == 2.5


def test_the_prediction_orders_tokens_as_their_gradients_do() -> None:
    """Gradients of random directions, whose squared norms follow the input: on other tokens."""
    truth_D = torch.tensor([1.0, -0.5, 0.0, 0.0, 0.3, 0.0])
    x_TD = random(TOKENS, SIZE) + 2.0
    gradient_TD = random(TOKENS, SIZE, seed=1) * (0.5 * x_TD @ truth_D).exp()[:, None]

    direction_D, offset = fit_sensitivity(x_TD, gradient_TD, PLACES_T)

    # A penalty of 1 on standardised inputs halves the coefficients.
    torch.testing.assert_close(direction_D, truth_D / 2, atol=0.05, rtol=0.0)
    others_TD = random(TOKENS, SIZE, seed=2) + 2.0
    logs_T = predicted_sensitivity(others_TD, direction_D, offset).log()
    assert abs(float(logs_T.mean())) < 0.1
    wanted_T = others_TD @ truth_D
    assert float(torch.corrcoef(torch.stack([logs_T, wanted_T]))[0, 1]) > 0.99


def test_what_is_known_is_left_out() -> None:
    x_TD, known_T = random(TOKENS, SIZE), random(TOKENS, seed=3).exp()
    plain_TD = random(TOKENS, SIZE, seed=1)
    scaled_TD = plain_TD * known_T.sqrt()[:, None]
    expected_D, expected = fit_sensitivity(x_TD, plain_TD, PLACES_T)
    found_D, found = fit_sensitivity(x_TD, scaled_TD, PLACES_T, known_T)
    torch.testing.assert_close(found_D, expected_D, atol=1e-5, rtol=1e-4)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_place_in_a_window_is_no_property_of_a_token() -> None:
    """Inputs that tell the place, and gradients that fall along a window: nothing is learnt."""
    x_TD = random(TOKENS, SIZE)
    x_TD[:, 0] += PLACES_T / 16
    gradient_TD = random(TOKENS, SIZE, seed=1)
    falling_TD = gradient_TD * (-(PLACES_T // 16)).float().exp()[:, None]
    found_D, _ = fit_sensitivity(x_TD, falling_TD, PLACES_T)
    expected_D, _ = fit_sensitivity(x_TD, gradient_TD, PLACES_T)
    torch.testing.assert_close(found_D, expected_D, atol=1e-5, rtol=1e-4)


def test_inputs_unlike_the_others_stay_within_limits() -> None:
    direction_D = torch.ones(SIZE)
    far_TD = torch.stack([torch.full((SIZE,), 50.0), torch.full((SIZE,), -50.0)])
    assert predicted_sensitivity(far_TD, direction_D, 0.0).log().tolist() == pytest.approx([4, -4])


def test_tokens_without_a_gradient() -> None:
    direction_D, offset = fit_sensitivity(random(20, SIZE), torch.zeros(20, SIZE), PLACES_T[:20])
    assert bool(torch.isfinite(direction_D).all())
    assert math.isfinite(offset)
    assert direction_D.abs().max() < 1e-4
