"""Block sizes of every kernel: the spaces that are tuned over, and one for the interpreter.

``docs/kernel_resources.json`` has what each of them takes on every architecture. A configuration
that spills registers or needs more shared memory than there is does not belong here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

GpuPlatform = Literal["cuda", "hip"]

# Up to so many tokens decode.py computes a forward. Above, tiles in which tokens share the weights
# of an expert read less.
DECODE_TOKENS = 4

# Rows of a tile: a tile reads all weights of its expert, rows that are missing compute nothing.
TILE_ROWS = {2: (16, 64, 128), 4: (16, 64)}

# Neurons per program of hidden_gradients_kernel. Not tuned: it sizes the partial sums of the
# factors' gradients, and thereby fixes the order in which they are added.
GRADIENT_NEURONS = 32


@dataclass(frozen=True)
class Blocks:
    """One configuration of a kernel.

    Args:
        block_n: columns of the output per program.
        block_k: length of the blocks that are summed over; None for a kernel without.
        block_m: rows of the output per program; None for a kernel without, and for one over tiles.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_n: int
    block_k: int | None = None
    block_m: int | None = None
    num_warps: int = 4
    num_stages: int = 3

    def sizes(self, tile_rows: int | None = None) -> dict[str, int]:
        """The kernel's constants, with the rows of a tile for a kernel over tiles."""
        rows = self.block_m if tile_rows is None else tile_rows
        named = {"BLOCK_M": rows, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {name: size for name, size in named.items() if size is not None}


def tile_rows(num_pairs: int, num_experts: int, element_size: int) -> int:
    """BLOCK_M: the smallest that holds an expert's mean number of pairs, or the largest."""
    sizes = TILE_ROWS[element_size]
    return next((rows for rows in sizes if rows * num_experts >= num_pairs), sizes[-1])


def space(
    kernel: str, dtype: torch.dtype, backend: GpuPlatform, rows: int | None = None
) -> tuple[Blocks, ...]:
    """The configurations to choose from, by timing them on the GPU that is there.

    Args:
        kernel: its name.
        dtype: of the weights.
        backend: CUDA or ROCm, which has less shared memory and other matrix instructions.
        rows: BLOCK_M, for a kernel over tiles.
    """
    if kernel in _VECTOR:
        return _VECTOR[kernel]
    return _MATRIX[backend, dtype.itemsize][kernel][rows]


def tile_choices(kernel: str, dtype: torch.dtype) -> tuple[int | None, ...]:
    """The rows of a tile that the kernel may be launched with; (None,) if it has no tiles."""
    over_tiles = kernel not in _VECTOR and kernel != "weight_gradient_kernel"
    return TILE_ROWS[dtype.itemsize] if over_tiles else (None,)


# Kernels without matrix instructions, limited by memory: the same everywhere.
_VECTOR: dict[str, tuple[Blocks, ...]] = {
    "slot_sum_kernel": (Blocks(512), Blocks(1024), Blocks(2048, num_warps=8)),
    "decode_hidden_kernel": (
        Blocks(8, 512),
        Blocks(16, 256),
        Blocks(16, 512, num_warps=8),
        Blocks(32, 128),
    ),
    "decode_down_kernel": (
        Blocks(32, 64),
        Blocks(32, 128, num_warps=8),
        Blocks(64, 64),
        Blocks(64, 128, num_warps=8),
    ),
}


def _blocks(*rows: tuple[int, int, int, int]) -> tuple[Blocks, ...]:
    """Rows of (BLOCK_N, BLOCK_K, num_warps, num_stages)."""
    return tuple(Blocks(n, k, num_warps=warps, num_stages=stages) for n, k, warps, stages in rows)


def _blocks_m(*rows: tuple[int, int, int, int, int]) -> tuple[Blocks, ...]:
    """Rows of (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)."""
    return tuple(Blocks(n, k, m, warps, stages) for m, n, k, warps, stages in rows)


# By backend and bytes per element, kernel, and rows of a tile.
_MATRIX: dict[tuple[GpuPlatform, int], dict[str, dict[int | None, tuple[Blocks, ...]]]] = {
    ("cuda", 2): {
        "gate_up_kernel": {
            16: _blocks((64, 64, 4, 4), (64, 128, 4, 3), (128, 64, 4, 4)),
            64: _blocks((64, 64, 4, 3), (128, 64, 8, 3), (128, 32, 4, 4)),
            128: _blocks((64, 64, 8, 3), (64, 32, 8, 4), (32, 64, 4, 3)),
        },
        "down_kernel": {
            16: _blocks((64, 64, 4, 4), (128, 64, 4, 3), (128, 128, 4, 3)),
            64: _blocks((64, 64, 4, 3), (128, 64, 4, 3), (256, 32, 8, 3)),
            128: _blocks((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3)),
        },
        "hidden_gradients_kernel": {
            16: _blocks((32, 64, 4, 3), (32, 128, 4, 3)),
            64: _blocks((32, 64, 4, 3), (32, 64, 8, 3)),
            128: _blocks((32, 64, 8, 3), (32, 32, 4, 3)),
        },
        "input_gradient_kernel": {
            16: _blocks((64, 64, 4, 3), (128, 64, 4, 3)),
            64: _blocks((64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 3)),
            128: _blocks((64, 64, 8, 3), (128, 32, 8, 3)),
        },
        "weight_gradient_kernel": {
            None: _blocks_m((64, 64, 32, 4, 3), (128, 64, 64, 8, 3), (128, 128, 32, 8, 3)),
        },
    },
    ("cuda", 4): {
        "gate_up_kernel": {
            16: _blocks((32, 32, 4, 3), (64, 32, 8, 3)),
            64: _blocks((32, 32, 4, 3), (64, 32, 8, 3)),
        },
        "down_kernel": {
            16: _blocks((64, 32, 4, 3), (128, 32, 4, 3)),
            64: _blocks((64, 32, 8, 3), (128, 32, 8, 3)),
        },
        "hidden_gradients_kernel": {
            16: _blocks((32, 32, 4, 3), (32, 64, 4, 2)),
            64: _blocks((32, 32, 8, 3), (32, 16, 4, 3)),
        },
        "input_gradient_kernel": {
            16: _blocks((64, 32, 4, 3), (128, 32, 4, 3)),
            64: _blocks((64, 32, 4, 3), (128, 16, 8, 3)),
        },
        "weight_gradient_kernel": {None: _blocks_m((32, 64, 32, 4, 3), (64, 64, 32, 8, 3))},
    },
    ("hip", 2): {
        "gate_up_kernel": {
            16: _blocks((64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 2)),
            64: _blocks((64, 64, 4, 2), (128, 32, 8, 2)),
            128: _blocks((64, 64, 8, 2), (128, 32, 8, 2)),
        },
        "down_kernel": {
            16: _blocks((64, 64, 4, 2), (128, 64, 4, 2)),
            64: _blocks((64, 64, 4, 2), (128, 64, 4, 2)),
            128: _blocks((128, 64, 8, 2), (128, 32, 4, 2), (256, 32, 8, 2)),
        },
        "hidden_gradients_kernel": {
            16: _blocks((32, 64, 4, 2)),
            64: _blocks((32, 32, 4, 2), (32, 64, 4, 2)),
            128: _blocks((32, 32, 8, 2), (32, 64, 8, 2)),
        },
        "input_gradient_kernel": {
            16: _blocks((64, 64, 4, 2), (128, 32, 4, 2)),
            64: _blocks((64, 64, 4, 2), (128, 32, 8, 2)),
            128: _blocks((64, 64, 8, 2), (128, 32, 8, 2)),
        },
        "weight_gradient_kernel": {None: _blocks_m((64, 64, 32, 4, 2), (128, 128, 32, 8, 2))},
    },
    ("hip", 4): {
        "gate_up_kernel": {
            16: _blocks((64, 32, 4, 2)),
            64: _blocks((64, 32, 4, 2), (32, 32, 4, 2)),
        },
        "down_kernel": {
            16: _blocks((64, 32, 4, 2)),
            64: _blocks((64, 32, 4, 2), (128, 32, 8, 2)),
        },
        "hidden_gradients_kernel": {
            16: _blocks((32, 32, 4, 2)),
            64: _blocks((32, 32, 4, 2), (32, 32, 8, 2)),
        },
        "input_gradient_kernel": {
            16: _blocks((64, 32, 4, 2)),
            64: _blocks((64, 32, 8, 2)),
        },
        "weight_gradient_kernel": {None: _blocks_m((64, 64, 32, 4, 2))},
    },
}

# One for Triton's interpreter, where tiles have the rows that a launch asks for.
INTERPRETED: dict[str, Blocks] = {
    "gate_up_kernel": Blocks(32, 32),
    "down_kernel": Blocks(32, 32),
    "slot_sum_kernel": Blocks(32),
    "decode_hidden_kernel": Blocks(32, 32),
    "decode_down_kernel": Blocks(32, 32),
    "hidden_gradients_kernel": Blocks(GRADIENT_NEURONS, 32),
    "input_gradient_kernel": Blocks(32, 32),
    "weight_gradient_kernel": Blocks(32, 32, 32),
}
