"""Dataclasses of tensors as files: the mapping to and from a safetensors file."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Self

import torch
from torch import Tensor


class TensorRecord:
    """A frozen dataclass of tensors that maps to and from a safetensors file."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields that are present, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def scalars(self) -> dict[str, int | float | str]:
        """The int, float and str fields, which go into the file's metadata."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: value for name, value in values.items() if isinstance(value, (int, float, str))
        }

    def to(self, device: torch.device) -> Self:
        """The record with its tensors on a device."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return replace(self, **moved)  # type: ignore[type-var]

    @classmethod
    def build(cls, tensors: dict[str, Tensor], scalars: dict[str, int | float | str]) -> Self:
        """Inverse of ``tensors()`` and ``scalars()``."""
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        known = {k: v for k, v in {**scalars, **tensors}.items() if k in names}
        return cls(**known)
