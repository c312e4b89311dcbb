"""Held-out windows and what is left to train on share no token of the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weaver.data.holdout import hold_out
from weaver.errors import WeaverError

BOS = -1


def cut(tokens: int, size: int, prefix: int = 0) -> Tensor:
    """A text whose tokens are 0, 1, ... in windows of one size."""
    body = size - prefix
    text_WB = torch.arange(tokens // body * body).view(-1, body)
    return torch.cat([torch.full((text_WB.shape[0], prefix), BOS), text_WB], dim=1)


def test_held_out_windows_by_hand() -> None:
    held_out_WT, rest = hold_out(cut(20, 2), 2, {2: cut(20, 2), 4: cut(20, 4)})
    # Windows 10 // 4 = 2 and 30 // 4 = 7 of ten.
    assert held_out_WT.tolist() == [[4, 5], [14, 15]]
    assert rest[2].tolist() == [[2 * w, 2 * w + 1] for w in range(10) if w not in (2, 7)]
    assert rest[4].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]


@given(
    st.integers(120, 400), st.integers(2, 9), st.integers(2, 9), st.integers(1, 3), st.booleans()
)
def test_no_token_is_in_both(tokens: int, length: int, size: int, count: int, bos: bool) -> None:
    prefix = int(bos)
    text_WT, training_WT = cut(tokens, length, prefix), cut(tokens, size, prefix)
    held_out_WT, rest = hold_out(text_WT, count, {size: training_WT}, prefix=prefix)
    assert held_out_WT.shape == (count, length)
    held_out = set(held_out_WT[:, prefix:].flatten().tolist())
    assert len(held_out) == count * (length - prefix)
    kept = {tuple(row) for row in rest[size].tolist()}
    for row in training_WT.tolist():
        assert (tuple(row) in kept) == held_out.isdisjoint(row[prefix:])


@pytest.mark.parametrize(("tokens", "count"), [(6, 2), (4, 3)])
def test_too_little_text(tokens: int, count: int) -> None:
    with pytest.raises(WeaverError, match=f"{count} held-out windows of 2 tokens leave none of 3"):
        hold_out(cut(tokens, 2), count, {3: cut(tokens, 3)})
