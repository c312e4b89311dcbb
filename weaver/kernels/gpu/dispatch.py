"""Which rows belong to which expert: the sorted pairs and the tiles over them, without a wait."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The pairs of token and expert sorted by expert, and the tiles that cover them.

    P = T K slots. Slot ``t K + k`` is the k-th of token t. A tile is up to ``block_m`` successive
    rows of one expert; nothing is padded. How many tiles there are is known on the device only, so
    the list has the length of the worst case and ends in tiles of expert E, which are to be
    skipped.

    Args:
        order_P: slot of each row, int64: slots by expert, then by slot; slots not in use last.
        offsets_E: first row of each expert and, as entry E, the number of rows in use, int64,
            (E + 1,).
        tile_experts_M: expert of each tile, int64, (M,).
        tile_rows_M: first row of each tile, int64, (M,).
        block_m: rows of a full tile.
    """

    order_P: Tensor
    offsets_E: Tensor
    tile_experts_M: Tensor
    tile_rows_M: Tensor
    block_m: int

    @property
    def num_tiles(self) -> int:
        """M, an upper bound."""
        return self.tile_experts_M.shape[0]

    def arguments(self) -> dict[str, Tensor]:
        """The lists under the names of the kernels' arguments."""
        return {
            "order_P": self.order_P,
            "offsets_E": self.offsets_E,
            "tile_experts_M": self.tile_experts_M,
            "tile_rows_M": self.tile_rows_M,
        }


def dispatch_pairs(ids_TK: Tensor, num_experts: int, block_m: int) -> Dispatch:
    """Sort the slots by expert and cut each expert's rows into tiles.

    M = floor(P / block_m) + min(E, P): each expert in use has at most one tile that is not full.

    Args:
        ids_TK: expert of each slot, E where the slot is not in use, int32 or int64, (T, K).
        num_experts: E.
        block_m: rows of a full tile.
    """
    ids_P = ids_TK.reshape(-1)
    sorted_P, order_P = ids_P.sort(stable=True)
    experts_E = torch.arange(num_experts + 1, device=ids_P.device, dtype=ids_P.dtype)
    offsets_E = torch.searchsorted(sorted_P, experts_E)
    counts_E = offsets_E.diff()
    ends_E = ((counts_E + (block_m - 1)) // block_m).cumsum(0)
    pairs = ids_P.shape[0]
    tiles_M = torch.arange(pairs // block_m + min(num_experts, pairs), device=ids_P.device)
    experts_M = torch.searchsorted(ends_E, tiles_M, right=True)
    # Tiles of the experts before; entry E, for the tiles past the end, is any valid row.
    before_E = torch.cat([ends_E.new_zeros(1), ends_E])
    rows_M = offsets_E[experts_M] + (tiles_M - before_E[experts_M]) * block_m
    return Dispatch(order_P, offsets_E, experts_M, rows_M, block_m)
