"""One shape for layers that are split differently."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaver.export.base import ALWAYS, NEVER
from weaver.export.placement import StockExpert, blocks, padded, per_expert, place
from weaver.models.accounting import LayerShape


def shape(shared: int, experts: int, width: int, top_k: int) -> LayerShape:
    return LayerShape(shared, experts, width, top_k, router_kind="linear" if experts else None)


def test_equal_layers_keep_their_shape() -> None:
    placement = place([shape(16, 4, 8, 2)] * 2)
    assert (placement.width, placement.num_shared, placement.num_routed, placement.top_k) == (
        *(8, 2, 4, 2),
    )
    assert [slot.expert for slot in placement.layers[0]] == [0, 1, 2, 3]
    assert placement.padded_neurons == 32


def test_more_shared_neurons_than_elsewhere_become_experts_that_are_always_selected() -> None:
    # 24 + 1 * 8 and 8 + 3 * 8 neurons: 32 either way, of which 8 are shared in both.
    placement = place([shape(24, 3, 8, 1), shape(8, 5, 8, 3)])
    assert (placement.num_shared, placement.top_k, placement.num_routed) == (1, 3, 5)
    assert placement.layers[0] == (
        StockExpert(ALWAYS, 8, 8),
        StockExpert(ALWAYS, 16, 8),
        *(StockExpert(e, 24 + 8 * e, 8) for e in range(3)),
    )
    assert [slot.expert for slot in placement.layers[1]] == [0, 1, 2, 3, 4]


def test_layers_that_select_fewer_experts_get_empty_ones() -> None:
    placement = place([shape(8, 4, 8, 3), shape(8, 2, 8, 1)])
    assert placement.top_k == 3
    second = placement.layers[1]
    assert [slot.expert for slot in second] == [ALWAYS, ALWAYS, 0, 1]
    assert [slot.neurons for slot in second] == [0, 0, 8, 8]


def test_a_layer_with_fewer_experts_gets_some_that_are_never_selected() -> None:
    placement = place([shape(8, 6, 8, 2), shape(8, 3, 8, 2)])
    assert [slot.expert for slot in placement.layers[1]] == [0, 1, 2, NEVER, NEVER, NEVER]


def test_shared_neurons_that_fill_no_expert_are_padded() -> None:
    placement = place([shape(17, 4, 8, 2)])
    assert placement.num_shared == 3
    assert placement.shared_neurons(shape(17, 4, 8, 2)) == 17


def test_a_static_layer_among_others_is_always_selected() -> None:
    placement = place([shape(8, 3, 8, 1), shape(20, 0, 0, 0)])
    assert {slot.expert for slot in placement.layers[1]} <= {ALWAYS, NEVER}


def test_static_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer has routed experts"):
        place([shape(20, 0, 0, 0)])


splits = st.builds(
    lambda shared, experts, width, k: shape(shared, experts, width, min(k, experts)),
    st.integers(0, 60),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 6),
)


@given(st.lists(splits, min_size=1, max_size=5))
def test_every_neuron_has_one_place(shapes: list[LayerShape]) -> None:
    placement = place(shapes)
    for own, slots in zip(shapes, placement.layers, strict=True):
        assert len(slots) == placement.num_routed >= 2
        neurons = list(range(placement.shared_neurons(own)))
        for slot in slots:
            assert slot.neurons <= placement.width
            neurons += range(slot.start, slot.start + slot.neurons)
        assert sorted(neurons) == list(range(own.total_neurons))
        always = [slot.expert for slot in slots].count(ALWAYS)
        assert always + own.num_experts_per_tok == placement.top_k
        assert sorted(s.expert for s in slots if s.expert >= 0) == list(range(own.n_routed_experts))


@given(st.lists(splits, min_size=1, max_size=4), st.integers(1, 70))
def test_no_other_number_of_shared_experts_needs_fewer_neurons(
    shapes: list[LayerShape], num_shared: int
) -> None:
    placement = place(shapes)
    width = placement.width
    top_k = max(
        s.num_experts_per_tok + -(-max(0, s.num_shared_neurons - num_shared * width) // width)
        for s in shapes
    )
    assert placement.padded_neurons <= (num_shared + top_k) * width


def test_rows_are_cut_and_padded_with_zeros() -> None:
    rows_FD = torch.arange(6.0).view(3, 2)
    experts = (StockExpert(ALWAYS, 0, 1), StockExpert(0, 1, 2), StockExpert(NEVER))
    first, second, third = blocks(rows_FD, experts, 2)
    assert first.tolist() == [[0, 1], [0, 0]]
    assert second.tolist() == [[2, 3], [4, 5]]
    assert third.tolist() == [[0, 0], [0, 0]]
    assert padded(rows_FD, 4)[3].tolist() == [0, 0]


def test_values_of_experts_follow_them() -> None:
    experts = (StockExpert(ALWAYS), StockExpert(1), StockExpert(0), StockExpert(NEVER))
    assert per_expert(torch.tensor([5.0, 7.0]), experts, 16.0).tolist() == [16, 7, 5, 0]
