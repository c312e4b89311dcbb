"""Pacing in vLLM's batches: what sequences have used lies beside their keys, slot by slot.

vLLM shows the tokens of many sequences as one row, prompts in chunks, and keeps keys in blocks that
sequences with a common beginning share. Every token has a slot there. The totals after a token are
kept under the same number, so that a sequence finds its state at the slot of the token before,
wherever that was computed: in an earlier step, an earlier chunk, or by another sequence whose
blocks it shares. What is recomputed or overwritten there is here as well.

Shapes: T tokens of a step, R sequences, L paced layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weaver.models.pacing import PacedLayer, Pacer


@dataclass(frozen=True)
class Batch:
    """Tokens of one step, sequence after sequence.

    Args:
        starts: first token of every sequence, and their end, int64, (R + 1,).
        before_R: tokens of the sequence that were computed before.
        last_R: slot of the last of them; any slot where there is none.
        slots_T: slot of every token.
    """

    starts: Tensor
    before_R: Tensor
    last_R: Tensor
    slots_T: Tensor


def current_batch(context: Any, block_size: int) -> Batch | None:
    """The sequences of the step that runs, from what vLLM's attention is told.

    Args:
        context: vLLM's forward context.
        block_size: slots of a block.

    Returns:
        None where they are not known or cannot be used: in a trial run without sequences; in
        halves that run beside each other; on a GPU, whose graphs would need fixed shapes.

    Raises:
        RuntimeError: slots do not follow from the blocks as weaver expects it of vLLM.
    """
    metadata = context.attn_metadata
    if not isinstance(metadata, dict) or not metadata:
        return None
    one = next(iter(metadata.values()))
    if one.slot_mapping.device.type != "cpu":
        return None
    starts = one.query_start_loc.long()
    before_R = one.seq_lens.long() - starts.diff()
    slots_T = one.slot_mapping[: int(starts[-1])].long()

    def slot_of(places_R: Tensor) -> Tensor:
        blocks_R = one.block_table.gather(1, places_R[:, None] // block_size)[:, 0].long()
        slots_R: Tensor = blocks_R * block_size + places_R % block_size
        return slots_R

    if not torch.equal(slot_of(before_R), slots_T[starts[:-1]]):
        raise RuntimeError(f"slots of vLLM's keys do not lie in blocks of {block_size}")
    return Batch(starts, before_R, slot_of((before_R - 1).clamp_min(0)), slots_T)


class BatchPacer:
    """A ``Pacer`` for steps of vLLM; layers call it as they call a ``Pacer``.

    Where sequences are not known it keeps no state: thresholds are the calibrated ones, and the
    first tokens of a sequence, known by their positions, run every expert.

    Args:
        layers: the paced layers in the model's order.
        first_tokens, early_tokens: see ``Pacer``.
        max_tokens: the most tokens of a step.
    """

    def __init__(
        self,
        layers: Sequence[PacedLayer],
        first_tokens: int,
        early_tokens: int,
        max_tokens: int,
    ) -> None:
        self._pacer = Pacer(layers, first_tokens, early_tokens)
        # Kept in one place: a captured graph reads it again.
        self._lowest_T = torch.zeros(max_tokens, dtype=torch.float32)
        self._totals_SC = torch.zeros(0, len(layers) + 1, dtype=torch.int32)
        self._batch: Batch | None = None

    def begin(self, positions_T: Tensor, batch: Batch | None) -> None:
        """Start a step.

        Args:
            positions_T: place of every token in its sequence.
            batch: which sequences they belong to, if that is known.
        """
        self._batch = batch
        if batch is None:
            first_T = positions_T < self._pacer.first_tokens
            self._lowest_T = self._lowest_T.to(positions_T.device)
            self._lowest_T[: first_T.shape[0]] = torch.where(first_T, -torch.inf, 0.0)
            return
        missing = int(batch.slots_T.max()) + 1 - self._totals_SC.shape[0]
        if missing > 0:
            # At least doubled, so that a table that grows is not copied at every step.
            added = max(missing, self._totals_SC.shape[0])
            more_SC = self._totals_SC.new_zeros(added, self._totals_SC.shape[1])
            self._totals_SC = torch.cat([self._totals_SC, more_SC])
        lengths_R = batch.starts.diff()
        longest, tokens = int(lengths_R.max()), batch.slots_T.shape[0]
        rows_T = torch.arange(lengths_R.shape[0]).repeat_interleave(lengths_R)
        offsets_T = torch.arange(tokens) - batch.starts[rows_T]
        # A row per sequence, as the pacer wants it, the shorter ones padded behind.
        self._places_T = rows_T * longest + offsets_T
        mask_BT = torch.zeros(lengths_R.shape[0], longest, dtype=torch.int32)
        mask_BT.view(-1)[self._places_T] = 1
        known_R1 = (batch.before_R > 0)[:, None]
        self._pacer.begin(mask_BT, self._totals_SC[batch.last_R] * known_R1)
        self._padded = mask_BT.numel()

    def lowest(self, index: int, rows: int) -> Tensor:
        """The score that an expert must exceed, (T,).

        Args:
            index: of the layer.
            rows: T; tokens of no sequence may follow those of the batch.
        """
        if self._batch is None:
            return self._lowest_T[:rows]
        lowest = self._pacer.lowest(index, self._padded)
        assert lowest is not None, "a step has begun"
        lowest_T = lowest.new_zeros(rows)
        lowest_T[: self._places_T.shape[0]] = lowest[self._places_T]
        return lowest_T

    def record(self, index: int, counts_T: Tensor) -> None:
        """Take the number of experts that every token used in a layer, (T,)."""
        if self._batch is None:
            return
        padded = counts_T.new_zeros(self._padded)
        padded[self._places_T] = counts_T[: self._places_T.shape[0]]
        self._pacer.record(index, padded)

    def end(self) -> None:
        """Keep what the step's tokens have spent."""
        totals_BTC = self._pacer.totals() if self._batch is not None else None
        if self._batch is not None and totals_BTC is not None:
            totals_TC = totals_BTC.flatten(0, 1)[self._places_T]
            self._totals_SC[self._batch.slots_T] = totals_TC
        self._pacer.end()
