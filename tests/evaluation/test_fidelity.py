"""Router against oracle, by hand and on converted modules."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_conversions import overlapping_layout, random_layout, random_router
from torch import Tensor, nn

from weaver.algorithms.contributions import expert_contributions, expert_errors
from weaver.algorithms.glu import GluWeights, glu_forward, glu_hidden
from weaver.artifacts.types import (
    SELECTIONS,
    Compensation,
    ExpertLayout,
    Router,
    Selection,
)
from weaver.evaluation.fidelity import (
    keep_inputs,
    module_fidelity,
    router_fidelity,
)
from weaver.models.moe import MoEFeedForward

# Three experts of one neuron each, h = relu(g) * g with g = x_0, x_1, x_0 + x_1.
GATE_FD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
DOWN_FD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.5]])
WEIGHTS = GluWeights(GATE_FD, GATE_FD, DOWN_FD, "relu")
LAYOUT = ExpertLayout(
    intermediate_size=3,
    top_k=1,
    shared_S=torch.empty(0, dtype=torch.int64),
    experts_EN=torch.tensor([[0], [1], [2]]),
)
X_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
# Sends the first token to expert 0 and the second one to expert 2.
ROUTER = Router(
    kind="linear",
    weight_ED=torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]),
    scale_E=torch.zeros(3),
    balance_bias_E=torch.zeros(3),
)
BIAS_ED = torch.tensor([[0.0, 0.0], [0.0, -2.0], [0.0, 2.0]])


def contributions(x_TD: Tensor, bias_ED: Tensor | None = None) -> Tensor:
    """``||h_e Wd_e + b_e||^2`` of the three experts, (T, 3)."""
    return expert_contributions(glu_hidden(x_TD, WEIGHTS), DOWN_FD, LAYOUT.experts_EN, bias_ED)


def test_fidelity_by_hand() -> None:
    contribution_TE = contributions(X_TD)
    assert contribution_TE.tolist() == [[1.0, 0.0, 0.25], [0.0, 4.0, 0.25]]
    fidelity = router_fidelity(X_TD, WEIGHTS, LAYOUT, ROUTER)
    # The oracle takes 0 and 1, the router 0 and 2.
    assert fidelity.oracle_agreement == 0.5
    assert fidelity.chance_agreement == pytest.approx(1 / 3)
    assert fidelity.captured_contribution == pytest.approx((1 + 0.25) / (1 + 4))
    # Token shares 1/2, 0, 1/2: mean 1/3, variance 1/18.
    assert fidelity.load_cv == pytest.approx(3 * math.sqrt(1 / 18))


def test_experts_that_stand_for_the_whole_ffn_by_hand() -> None:
    """Outputs (1, 0), (0, 0), (0, 0.5) for (1, 0.5), and 0, (0, 2), (0, 0.5) for (0, 2.5)."""
    dense_TD = torch.tensor([[1.0, 0.5], [0.0, 2.5]])
    fidelity = router_fidelity(X_TD, WEIGHTS, LAYOUT, ROUTER, dense_TD=dense_TD)
    # Squared errors 0.25, 1.25, 1 and 6.25, 0.25, 4, worth 1, 0, 0.25 and 0, 6, 2.25. The oracle
    # takes 0 and 1, the router 0 and 2.
    assert fidelity.oracle_agreement == 0.5
    assert fidelity.captured_contribution == pytest.approx((1 + 2.25) / (1 + 6))
    # A bias of the output is no expert's doing.
    biased = replace(WEIGHTS, output_bias_D=torch.tensor([7.0, 8.0]))
    moved_TD = dense_TD + torch.tensor([7.0, 8.0])
    again = router_fidelity(X_TD, biased, LAYOUT, ROUTER, dense_TD=moved_TD)
    assert asdict(again) == pytest.approx(asdict(fidelity))


def test_a_module_that_averages_its_experts_is_compared_with_the_dense_ffn() -> None:
    weights = _random_weights(22, 1)
    layout = overlapping_layout(22, experts=4, width=9, top_k=1, shared=3)
    router = random_router("linear", 4, 6, weighting="softmax")
    bias_ED = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    ffn = MoEFeedForward.convert(weights, layout, router, Compensation(expert_bias_ED=bias_ED))
    x_TD = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    measured = module_fidelity(x_TD, ffn, weights)
    expected = router_fidelity(
        x_TD, weights, layout, router, bias_ED, dense_TD=glu_forward(x_TD, weights)
    )
    assert asdict(measured) == pytest.approx(asdict(expected))
    # With one expert per token the chosen output is the module's.
    error_T = (ffn(x_TD) - glu_forward(x_TD, weights)).square().sum(1)
    routing = ffn.routing(x_TD)
    assert routing is not None
    hidden_TF = glu_hidden(x_TD, weights)
    rest_TD = glu_forward(x_TD, weights) - hidden_TF[:, :3] @ weights.down_FD[:3]
    error_TE = expert_errors(rest_TD, hidden_TF, weights.down_FD, layout.experts_EN, bias_ED)
    torch.testing.assert_close(error_TE[routing.selected_TE()], error_T, rtol=1e-4, atol=1e-4)


def test_an_expert_bias_changes_the_oracle() -> None:
    contribution_TE = contributions(X_TD, BIAS_ED)
    # Outputs of expert 1: (0, -2) and (0, 2 - 2); of expert 2: (0, 0.5 + 2) twice.
    assert contribution_TE.tolist() == [[1.0, 4.0, 6.25], [0.0, 0.0, 6.25]]
    fidelity = router_fidelity(X_TD, WEIGHTS, LAYOUT, ROUTER, BIAS_ED)
    # The oracle takes 2 twice, the router 0 and 2.
    assert fidelity.oracle_agreement == 0.5
    assert fidelity.captured_contribution == pytest.approx((1 + 6.25) / (6.25 + 6.25))


THRESHOLD = replace(LAYOUT, selection="threshold")


def test_a_threshold_is_compared_with_the_best_pairs_of_all_tokens() -> None:
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert contributions(x_TD).tolist() == [[1, 0, 0.25], [0, 64, 4]]
    # Logits (1/2, -1/2, -1/2) and (-1/2, 3/2, 3/2): the three pairs of 1, 64 and 4.
    weight_ED = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    best = replace(ROUTER, weight_ED=weight_ED, bias_E=torch.full((3,), -0.5))
    fidelity = router_fidelity(x_TD, WEIGHTS, THRESHOLD, best)
    assert (fidelity.oracle_agreement, fidelity.captured_contribution) == (1, 1)
    assert fidelity.chance_agreement == 3 / 6
    assert fidelity.load_cv == 0
    # Expert 2 for both tokens; the two best pairs both are of the second token.
    third = replace(ROUTER, weight_ED=torch.zeros(3, 2), bias_E=torch.tensor([-1.0, -1.0, 1.0]))
    fidelity = router_fidelity(x_TD, WEIGHTS, THRESHOLD, third)
    assert fidelity.oracle_agreement == 0.5
    assert fidelity.chance_agreement == 2 / 6
    assert fidelity.captured_contribution == pytest.approx(4.25 / 68)
    # Loads 0, 0, 2: mean 2/3, variance 8/9.
    assert fidelity.load_cv == pytest.approx(math.sqrt(8 / 9) * 3 / 2)
    # By top-1 the same router chooses the same, but its oracle takes experts 0 and 1.
    fidelity = router_fidelity(x_TD, WEIGHTS, LAYOUT, third)
    assert fidelity.oracle_agreement == 0
    assert fidelity.captured_contribution == pytest.approx(4.25 / 65)


def test_a_threshold_that_chooses_nothing() -> None:
    router = replace(ROUTER, bias_E=torch.full((3,), -9.0))
    fidelity = router_fidelity(X_TD, WEIGHTS, THRESHOLD, router)
    assert set(asdict(fidelity).values()) == {0.0}


def _random_weights(neurons: int, seed: int) -> GluWeights:
    generator = torch.Generator().manual_seed(seed)
    gate_FD, up_FD, down_FD = torch.randn(3, neurons, 6, generator=generator)
    gate_bias_F = torch.randn(neurons, generator=generator)
    return GluWeights(gate_FD, up_FD, down_FD, "silu", gate_bias_F=gate_bias_F)


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(SELECTIONS))
@settings(max_examples=20, deadline=None)
def test_no_router_captures_more_than_the_oracle(
    seed: int, top_k: int, selection: Selection
) -> None:
    weights = _random_weights(22, seed)
    layout = random_layout(22, shared=2, experts=4, top_k=top_k, seed=seed, selection=selection)
    router = random_router("linear", 4, 6, seed=seed)
    x_TD = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    fidelity = router_fidelity(x_TD, weights, layout, router)
    assert 0 < fidelity.captured_contribution <= 1 + 1e-6
    assert (fidelity.captured_contribution == pytest.approx(1)) == (
        fidelity.oracle_agreement == pytest.approx(1)
    )
    if top_k == 4 and selection == "top-k":
        assert fidelity.oracle_agreement == fidelity.chance_agreement == 1


@pytest.mark.parametrize(
    ("kind", "selection"), [("linear", "top-k"), ("linear", "threshold"), ("glu", "top-k")]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_module_is_measured_as_the_layer_it_was_made_from(
    kind: str, selection: Selection, with_bias: bool
) -> None:
    weights = _random_weights(22, 1)
    layout = random_layout(22, shared=4, experts=6, top_k=2, seed=1, selection=selection)
    router = random_router("glu" if kind == "glu" else "linear", 6, 6, seed=1)
    x_TD = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    bias_ED = 3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
    compensation = Compensation(expert_bias_ED=bias_ED) if with_bias else None
    ffn = MoEFeedForward.convert(weights, layout, router, compensation)

    measured = module_fidelity(x_TD, ffn, weights)

    expected = router_fidelity(x_TD, weights, layout, router, bias_ED if with_bias else None)
    assert asdict(measured) == pytest.approx(asdict(expected))
    plain = router_fidelity(x_TD, weights, layout, router)
    assert (measured.captured_contribution == pytest.approx(plain.captured_contribution)) != (
        with_bias
    )


def test_a_static_module_has_no_fidelity() -> None:
    layout = random_layout(22, shared=8, experts=0, top_k=0)
    ffn = MoEFeedForward.convert(_random_weights(22, 0), layout, None)
    with pytest.raises(ValueError, match="routes nothing"):
        module_fidelity(torch.zeros(1, 6), ffn, _random_weights(22, 0))


def test_inputs_are_kept_at_their_positions_in_the_stream() -> None:
    weights = _random_weights(22, 0)
    static = MoEFeedForward.convert(weights, random_layout(22, shared=8, experts=0, top_k=0), None)
    layout = random_layout(22, shared=4, experts=6, top_k=2)
    routed = MoEFeedForward.convert(weights, layout, random_router("linear", 6, 6))
    model = nn.Sequential(static, nn.Tanh(), routed)
    windows_WTD: Tensor = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))

    with keep_inputs(model, torch.tensor([0, 5, 7, 8, 14])) as kept:
        for window_TD in windows_WTD:
            model(window_TD[None])
    model(windows_WTD[:1])  # after the block: not seen

    assert [(entry.layer, entry.ffn) for entry in kept] == [(1, routed)]
    flat_TD = windows_WTD.reshape(16, 6)[[0, 5, 7, 8, 14]]
    torch.testing.assert_close(kept[0].inputs(), static(flat_TD).tanh())
