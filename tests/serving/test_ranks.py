"""Neurons cut between ranks: the sum of the ranks' outputs is the layer's."""

from __future__ import annotations

import pytest
import torch

from weaver.errors import WeaverError
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward
from weaver.serving.ranks import cut_rows, cut_shape

SHAPE = LayerShape(
    num_shared_neurons=7,
    n_routed_experts=4,
    moe_intermediate_size=5,
    num_experts_per_tok=2,
    router_kind="linear",
    gate_bias=True,
    selection="threshold",
)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_sum_over_ranks_is_the_layer(ranks: int) -> None:
    torch.manual_seed(0)
    whole = MoEFeedForward(SHAPE, 6, "silu", std=1.0)
    x_TD = torch.randn(9, 6)
    parts = []
    for rank in range(ranks):
        part = MoEFeedForward(cut_shape(SHAPE, rank, ranks), 6, "silu")
        state = whole.state_dict()
        for name in ("gate_weight", "up_weight", "down_weight", "gate_bias"):
            state[name] = cut_rows(state[name], SHAPE, rank, ranks)
        part.load_state_dict(state)
        parts.append(part)
    # Every rank selects alike, and some tokens skip experts.
    routings = [part.routing(x_TD) for part in (whole, *parts)]
    selected = [routing.selected_TE() for routing in routings if routing is not None]
    assert len(selected) == ranks + 1
    assert all(torch.equal(each, selected[0]) for each in selected)
    assert 0 < selected[0].float().mean() < 1
    torch.testing.assert_close(sum(part(x_TD) for part in parts), whole(x_TD))
    assert sum(part.shape.total_neurons for part in parts) == SHAPE.total_neurons


def test_more_ranks_than_neurons_of_an_expert_are_refused() -> None:
    with pytest.raises(WeaverError, match="6 ranks for experts of 5 neurons"):
        cut_shape(SHAPE, 0, 6)
