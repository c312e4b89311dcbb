"""How a kernel starts: compiled and tuned on a GPU, in Triton's interpreter on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

from weaver.kernels.gpu.configurations import INTERPRETED, Blocks, GpuPlatform, space

Grid = Callable[[Mapping[str, int]], tuple[int, ...]]


def launch(
    kernel: Any, grid: Grid, arguments: Mapping[str, Any], block_m: int | None = None
) -> None:
    """Run a kernel over a grid, on the device of its tensors.

    On a CPU that is the interpreter, which takes milliseconds per block: for tests.

    Args:
        kernel: the function under ``triton.jit``.
        grid: the size of the grid for given block sizes.
        arguments: all arguments by name except block sizes and ``UPCAST``.
        block_m: rows of a tile, for kernels over the tiles of a ``Dispatch``.
    """
    first = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    if first.device.type == "cpu":
        from weaver.kernels.gpu.interpret import interpret

        sizes = INTERPRETED[kernel.fn.__name__].sizes(block_m)
        upcast = {"UPCAST": True} if "UPCAST" in kernel.arg_names else {}
        interpret(kernel, grid, {**arguments, **sizes, **upcast})
        return
    with torch.cuda.device(first.device):
        tuned(kernel, first.dtype, block_m)[grid](**arguments)


@functools.cache
def tuned(kernel: Any, dtype: torch.dtype, block_m: int | None) -> Any:
    """The kernel with its space of configurations, tuned once per shape of the experts.

    T is not in the key: what depends on it is ``block_m``. Kernels neither change their inputs nor
    add to their outputs, so that tuning may repeat them.
    """
    backend: GpuPlatform = "hip" if torch.version.hip else "cuda"
    configs = [
        to_triton(blocks, block_m) for blocks in space(kernel.fn.__name__, dtype, backend, block_m)
    ]
    return triton.autotune(configs=configs, key=["hidden_size", "width"])(kernel)


def to_triton(blocks: Blocks, block_m: int | None) -> triton.Config:
    return triton.Config(
        blocks.sizes(block_m), num_warps=blocks.num_warps, num_stages=blocks.num_stages
    )
