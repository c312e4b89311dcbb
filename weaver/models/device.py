"""The device of a computation: the one place where its name becomes a ``torch.device``."""

from __future__ import annotations

import torch

from weaver.errors import WeaverError

CPU = torch.device("cpu")


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for: ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        WeaverError: there is no such device, or no GPU of that number.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if count else CPU
    if name == "cpu":
        return CPU
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (name == "cuda" or (number.isdecimal() and len(number) <= 3)):
        raise WeaverError(
            f"device {name!r}",
            why="a device is auto, cpu, cuda or cuda:N",
            fix="--device auto",
        )
    if not count:
        raise WeaverError(
            f"device {name!r}: torch finds no GPU",
            why=f"torch {torch.__version__} "
            + ("sees none" if torch.version.cuda else "was built without CUDA"),
            fix="--device cpu, or install a GPU's driver and a torch built with CUDA",
        )
    if int(number or 0) >= count:
        raise WeaverError(
            f"device {name!r} of {count} GPUs",
            why=f"they are numbered from 0 to {count - 1}",
            fix="--device cuda:0",
        )
    return torch.device("cuda", int(number or 0))


def has_room(device: torch.device, size: int) -> bool:
    """Whether some bytes are at most half of what is free on a GPU: layers need the rest."""
    return device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2
