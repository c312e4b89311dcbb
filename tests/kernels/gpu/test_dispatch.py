"""Sorted pairs and tiles, by hand and as properties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from weaver.kernels.gpu.dispatch import dispatch_pairs


def test_by_hand() -> None:
    """Three experts, five tokens with two slots; id 3 is a slot that is not in use."""
    ids_TK = torch.tensor([[2, 0], [2, 3], [0, 2], [3, 3], [2, 0]])
    found = dispatch_pairs(ids_TK, 3, 2)
    # Expert 0 has slots 1, 4, 9; expert 2 has 0, 2, 5, 8; not in use are 3, 6, 7.
    assert found.order_P.tolist() == [1, 4, 9, 0, 2, 5, 8, 3, 6, 7]
    assert found.offsets_E.tolist() == [0, 3, 3, 7]
    # Rows 0-1, 2 of expert 0 and 3-4, 5-6 of expert 2; 10 // 2 + 3 tiles at most.
    assert found.num_tiles == 8
    assert found.tile_experts_M.tolist() == [0, 0, 2, 2, 3, 3, 3, 3]
    assert found.tile_rows_M[:4].tolist() == [0, 2, 3, 5]


@given(data=st.data(), experts=st.integers(1, 6), block_m=st.sampled_from([1, 2, 16]))
def test_tiles_cover_every_pair_once(data: st.DataObject, experts: int, block_m: int) -> None:
    tokens, top_k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, experts))
    slots = st.lists(st.integers(0, experts), min_size=tokens * top_k, max_size=tokens * top_k)
    ids_TK = torch.tensor(data.draw(slots)).view(tokens, top_k)
    found = dispatch_pairs(ids_TK, experts, block_m)
    ids_P = ids_TK.reshape(-1)
    assert sorted(found.order_P.tolist()) == list(range(tokens * top_k))
    covered = []
    for expert, first in zip(
        found.tile_experts_M.tolist(), found.tile_rows_M.tolist(), strict=True
    ):
        if expert == experts:
            continue
        end = min(first + block_m, int(found.offsets_E[expert + 1]))
        assert found.offsets_E[expert] <= first < end
        covered += found.order_P[first:end].tolist()
        assert (ids_P[found.order_P[first:end]] == expert).all()
    assert covered == [slot for slot in found.order_P.tolist() if ids_P[slot] < experts]


def test_it_does_not_wait_for_the_device() -> None:
    """Without values at hand, whatever would need one raises."""
    with FakeTensorMode():
        found = dispatch_pairs(torch.zeros(7, 2, dtype=torch.int64), 5, 16)
    assert found.order_P.shape == (14,)
    assert found.offsets_E.shape == (6,)
    assert found.tile_rows_M.shape == found.tile_experts_M.shape == (5,)
