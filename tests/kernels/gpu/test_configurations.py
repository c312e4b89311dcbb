"""Tiles and spaces of configurations."""

from __future__ import annotations

import pytest
import torch

from weaver.kernels.gpu.compile import KERNELS
from weaver.kernels.gpu.configurations import (
    GRADIENT_NEURONS,
    INTERPRETED,
    TILE_ROWS,
    Blocks,
    GpuPlatform,
    space,
    tile_choices,
    tile_rows,
)

BACKENDS: tuple[GpuPlatform, ...] = ("cuda", "hip")


def test_the_rows_of_a_tile_by_hand() -> None:
    # 16, 17, 64, 65 and many pairs per expert.
    counts = (128, 136, 512, 520, 10**6)
    assert [tile_rows(pairs, 8, 2) for pairs in counts] == [16, 64, 64, 128, 128]
    assert [tile_rows(pairs, 8, 4) for pairs in counts] == [16, 64, 64, 64, 64]


def test_names_of_block_sizes() -> None:
    assert Blocks(64, 32, 16).sizes() == {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}
    assert Blocks(64, 32).sizes(128) == {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}
    assert Blocks(64).sizes() == {"BLOCK_N": 64}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_configurations_with_its_constants(
    kernel: str, dtype: torch.dtype, backend: GpuPlatform
) -> None:
    constants = {name for name in KERNELS[kernel].arg_names if name.startswith("BLOCK_")}
    choices = tile_choices(kernel, dtype)
    assert choices in ((None,), TILE_ROWS[dtype.itemsize])
    for rows in choices:
        configurations = space(kernel, dtype, backend, rows)
        assert 1 <= len(configurations) == len(set(configurations))
        for blocks in configurations:
            assert set(blocks.sizes(rows)) == constants
            if kernel == "hidden_gradients_kernel":
                assert blocks.block_n == GRADIENT_NEURONS
    assert set(INTERPRETED[kernel].sizes(choices[0])) == constants


def test_only_kernels_over_tiles_are_given_the_rows() -> None:
    given = {kernel for kernel in KERNELS if tile_choices(kernel, torch.float32) != (None,)}
    over_tiles = {name for name in KERNELS if "tile_rows_M" in KERNELS[name].arg_names}
    assert given == over_tiles
