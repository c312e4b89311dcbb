"""Tensors of a checkpoint by the names that modules in memory have, read one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
        self._files = dict(self._entries(weight_files(folder)))

    def names(self) -> list[str]:
        """Every tensor in the checkpoint."""
        return sorted(self._files)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in.

        Raises:
            WeaverError: the checkpoint holds no such tensor.
        """
        if name not in self._files:
            raise WeaverError(
                f"{self.folder}: holds no tensor {name!r}",
                why=f"the row {self.family.model_type!r} of the family table names it; "
                f"the checkpoint has {', '.join(self.names()[:4])}, ...",
                fix="check that this is the whole checkpoint of a causal language model",
            )
        path, stored_name = self._files[name]
        with safe_open(path, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(stored_name)
            return tensor

    def shape(self, name: str) -> list[int]:
        """Shape of one tensor, without reading it."""
        path, stored_name = self._files[name]
        with safe_open(path, framework="pt") as handle:
            return list(handle.get_slice(stored_name).get_shape())

    def _paths(self) -> set[Path]:
        return {path for path, _ in self._files.values()}

    def _entries(self, files: list[Path]) -> Iterator[tuple[str, tuple[Path, str]]]:
        """Names that the modules in memory have, and where each tensor lies under which name."""
        for path in files:
            check_tensors_file(path, rebuild=f"fetch {path.name} again")
            try:
                with safe_open(path, framework="pt") as handle:
                    names = handle.keys()
            except SafetensorError as error:
                raise WeaverError(
                    f"{path}: damaged", why=str(error), fix=f"fetch {path.name} again"
                ) from error
            for name in names:
                if not name.endswith(_DERIVED) and not self._beyond(name):
                    yield self._renamed(name), (path, name)

    def _renamed(self, name: str) -> str:
        for stored, loaded in self.family.renames:
            name = name.replace(stored, loaded)
        return name

    def _beyond(self, name: str) -> bool:
        """Whether it belongs to a layer that the model does not have, as multi-token heads do."""
        index = name.removeprefix(f"{self.family.layers}.").partition(".")[0]
        return index.isdecimal() and int(index) >= self.num_layers
