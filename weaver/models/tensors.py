"""Tensors of a checkpoint by the names that modules in memory have, read one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from weaver.artifacts.finite import require_finite
from weaver.artifacts.header import TensorEntry
from weaver.artifacts.store import check_tensors_file
from weaver.errors import WeaverError
from weaver.models.families import Family
from weaver.models.locate import weight_files

# Early Llama checkpoints store the rotary frequencies, which transformers derives from the config.
_DERIVED = ".rotary_emb.inv_freq"

# What glm4_moe adds to its router's scores is kept in float32.
FLOAT32 = ".e_score_correction_bias"


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in a model of a dtype; some stay in float32."""
    return torch.float32 if name.endswith(FLOAT32) else dtype


class StoredTensor(NamedTuple):
    """Place of a tensor: file, name in it, and its entry in the file's header."""

    path: Path
    name: str
    entry: TensorEntry


class TensorFiles:
    """The safetensors files of a model folder.

    Args:
        folder: where they lie.
        family: what its checkpoints call differently.
        num_layers: layers of the model; tensors of others, as of heads that predict further tokens,
            are left out.

    Raises:
        WeaverError: no such files, or a damaged one.
    """

    def __init__(self, folder: Path, family: Family, num_layers: int) -> None:
        self.folder = folder
        self.family = family
        self.num_layers = num_layers
        self._layers: set[int] = set()
        self._files: dict[str, StoredTensor] = {}
        for name, stored in self._entries(weight_files(folder)):
            if name in self._files:
                raise WeaverError(
                    f"{folder}: tensor {name!r} stands in {self._files[name].path.name} and in "
                    f"{stored.path.name}",
                    why="which of the two the model has, nothing says",
                    fix="fetch the checkpoint again, or remove the file that is not part of it",
                )
            self._files[name] = stored
        self._handles: dict[Path, Any] = {}

    def names(self) -> list[str]:
        """Every tensor in the checkpoint."""
        return sorted(self._files)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in.

        Raises:
            WeaverError: the checkpoint holds no such tensor, or it has a value that is NaN or
                infinite.
        """
        if name not in self._files:
            raise WeaverError(
                f"{self.folder}: holds no tensor {name!r}",
                why=f"the row {self.family.model_type!r} of the family table names it; "
                f"the checkpoint has {', '.join(self.names()[:4])}, ...",
                fix="check that this is the whole checkpoint of a causal language model",
            )
        stored = self._files[name]
        # Opened once: a file of thousands of tensors has a header that takes long to read.
        if stored.path not in self._handles:
            self._handles[stored.path] = safe_open(stored.path, framework="pt")
        tensor: Tensor = self._handles[stored.path].get_tensor(stored.name)
        require_finite(
            {repr(name): tensor},
            str(stored.path),
            why="a model with such a weight computes nothing",
            fix=f"fetch {stored.path.name} again, or another release of the model",
        )
        return tensor

    def shape(self, name: str) -> list[int]:
        """Shape of one tensor, without reading it."""
        return list(self._files[name].entry.shape)

    def stored_layers(self) -> int:
        """Layers of which the files hold a tensor, those beyond the model's included."""
        return len(self._layers)

    def _paths(self) -> set[Path]:
        return {stored.path for stored in self._files.values()}

    def _entries(self, files: list[Path]) -> Iterator[tuple[str, StoredTensor]]:
        """Names that the modules in memory have, and where each tensor lies under which name."""
        for path in files:
            header = check_tensors_file(path, rebuild=f"fetch {path.name} again")
            for name, entry in header.entries.items():
                if not name.endswith(_DERIVED) and not self._beyond(name):
                    yield self._renamed(name), StoredTensor(path, name, entry)

    def _renamed(self, name: str) -> str:
        for stored, loaded in self.family.renames:
            name = name.replace(stored, loaded)
        return name

    def _beyond(self, name: str) -> bool:
        """Whether it belongs to a layer that the model does not have, as multi-token heads do."""
        prefix = f"{self.family.layers}."
        index = name.removeprefix(prefix).partition(".")[0]
        # Of four digits at most: a name may hold thousands, which are no number of a layer.
        if not (name.startswith(prefix) and index.isdecimal() and len(index) <= 4):
            return False
        self._layers.add(int(index))
        return int(index) >= self.num_layers
