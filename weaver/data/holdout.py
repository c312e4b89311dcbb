"""Windows of a text that are kept from training, to measure on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from weaver.errors import WeaverError


def hold_out(
    text_WT: Tensor, count: int, training: Mapping[int, Tensor], *, prefix: int = 0
) -> tuple[Tensor, dict[int, Tensor]]:
    """Take windows that are spread evenly over a text out of what is trained on.

    Held out of W windows are those with the indices ``(2 i + 1) W // (2 count)``, i = 0..count-1.
    All tensors are consecutive windows of one text from its beginning, so that a training window
    of another length is left out where it shares a token of the text with a held-out one.

    Args:
        text_WT: the text in windows of the length that is measured on, (W, T).
        count: how many are held out.
        training: the same text in windows of each length that is trained on, (W_n, n) by n.
        prefix: tokens at the start of every window that are none of the text (bos).

    Returns:
        The held-out windows, (count, T), and the rest of ``training``.

    Raises:
        WeaverError: there are fewer windows, or one length keeps none to train on.
    """
    windows, length = text_WT.shape
    held_out = (2 * torch.arange(count, device="cpu") + 1) * windows // (2 * count)
    starts = held_out * (length - prefix)
    rest: dict[int, Tensor] = {}
    for size, windows_WT in training.items():
        body = size - prefix
        begins_W = torch.arange(windows_WT.shape[0], device="cpu")[:, None] * body
        overlaps_W = ((begins_W < starts + length - prefix) & (starts < begins_W + body)).any(1)
        rest[size] = windows_WT[~overlaps_W]
    empty = [size for size, windows_WT in rest.items() if len(windows_WT) == 0]
    if windows < count or empty:
        sizes = ", ".join(str(size) for size in empty or training)
        raise WeaverError(
            f"{count} held-out windows of {length} tokens leave none of {sizes} to train on",
            why=f"finetune.eval_data names no text, so they are taken from data, which has "
            f"{windows} windows of {length}",
            fix="--set finetune.eval_data=[builtin:held-out], or more data",
        )
    return text_WT[held_out], rest
