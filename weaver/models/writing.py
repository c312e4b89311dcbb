"""Writing a Hugging Face checkpoint shard by shard, without the whole model in memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from weaver.artifacts.store import (
    check_tensors_file,
    copy_file,
    disk_errors,
    write_json,
    write_model_shard,
)
from weaver.errors import WeaverError, shell
from weaver.models.accounting import LayerShape
from weaver.models.checkpoint import Checkpoint
from weaver.models.ffns import site_prefix
from weaver.models.intake import inside
from weaver.models.moe import MoEFeedForward
from weaver.models.tensors import stored_dtype

INDEX_FILE = "model.safetensors.index.json"
# Files beside the weights that a converted model needs unchanged. A copy, since a tokenizer saved
# by transformers holds how it was loaded (offline or not), which would change the digest.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Part:
    """Tensors that are made together: one decoder layer, or what lies outside the layers.

    Args:
        sizes: bytes per tensor, by name.
        load: makes the tensors.
    """

    sizes: dict[str, int]
    load: Callable[[], dict[str, Tensor]]

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write a configuration's files as transformers does, each of them whole or not at all."""
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix="weaver-") as made:
        config.save_pretrained(made)
        for path in sorted(Path(made).iterdir()):
            copy_file(path, folder / path.name)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and the generation config of a model folder beside other weights."""
    for name in COMPANIONS:
        if (source / name).is_file():
            copy_file(inside(source, name), target / name)


def weights_bytes(folder: Path) -> int:
    """Bytes of a model folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB (powers of ten; GiB and MiB are powers of two).

    Raises:
        WeaverError: not a positive number with a known unit.
    """
    upper = text.strip().upper()
    for unit in sorted(_UNITS, key=len, reverse=True):
        number = upper.removesuffix(unit).strip()
        if upper.endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * _UNITS[unit])
    raise WeaverError(
        f"size {text!r} is not understood",
        why=f"a size is a positive number and one of {', '.join(_UNITS)}",
        fix="--max-shard-size 5GB",
    )


def plan_shards(parts: Sequence[Part], limit: int) -> list[list[Part]]:
    """Group consecutive parts into shards of at most ``limit`` bytes; no part is divided."""
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and sum(p.size for p in shards[-1]) + part.size > limit:
            shards.append([])
        shards[-1].append(part)
    return shards


def shard_names(count: int) -> list[str]:
    """File names in the hub's convention."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_shards(
    folder: Path, parts: Sequence[Part], limit: int, on_shard: Callable[[str], None]
) -> None:
    """Write the checkpoint, and its index if there is more than one shard.

    A shard that is there already is kept: it was renamed into place when it was complete.
    """
    shards = plan_shards(parts, limit)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        if (folder / name).exists():
            check_tensors_file(
                folder / name, rebuild=f"{shell('rm', folder / name)} and rerun the command"
            )
        else:
            tensors: dict[str, Tensor] = {}
            for part in shard:
                tensors |= part.load()
            write_model_shard(folder / name, tensors)
        on_shard(name)
    if len(shards) > 1:
        weight_map = {
            key: name
            for name, shard in zip(names, shards, strict=True)
            for part in shard
            for key in part.sizes
        }
        total = sum(part.size for part in parts)
        write_json(
            folder / INDEX_FILE,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )


def converted_parts(
    checkpoint: Checkpoint,
    shapes: Sequence[LayerShape],
    ffn_tensors: Callable[[int], dict[str, Tensor]],
    dtype: torch.dtype,
) -> list[Part]:
    """Parts of the converted model: everything of the dense one, with other FFN tensors.

    Args:
        checkpoint: the dense model.
        shapes: shape of every converted FFN.
        ffn_tensors: state dict of a converted FFN, by its number, in ``dtype``.
        dtype: dtype of every written tensor, except of those that the family keeps in float32.
    """
    parts = [_outer_part(checkpoint, dtype)]
    parts += [
        _layer_part(checkpoint, layer, shapes, ffn_tensors, dtype)
        for layer in range(checkpoint.num_layers)
    ]
    return parts


def _outer_part(checkpoint: Checkpoint, dtype: torch.dtype) -> Part:
    names = checkpoint.outer_names()
    if getattr(checkpoint.config, "tie_word_embeddings", False):
        names = [name for name in names if name != "lm_head.weight"]
    return Part(
        _sizes(checkpoint, names, dtype),
        lambda: {name: checkpoint.cast(name, dtype) for name in names},
    )


def _layer_part(
    checkpoint: Checkpoint,
    layer: int,
    shapes: Sequence[LayerShape],
    ffn_tensors: Callable[[int], dict[str, Tensor]],
    dtype: torch.dtype,
) -> Part:
    kept = [name for name in checkpoint.layer_names(layer) if not checkpoint.is_ffn(name)]
    sites = checkpoint.layer_sites(layer)
    sizes: dict[str, int] = {}
    for site in sites:
        with torch.device("meta"):
            module = MoEFeedForward(
                shapes[site.number], checkpoint.hidden_size, checkpoint.activation
            )
        sizes |= {
            f"{site_prefix(checkpoint.family, site)}{name}": tensor.numel() * dtype.itemsize
            for name, tensor in module.state_dict().items()
        }

    def load() -> dict[str, Tensor]:
        tensors = {name: checkpoint.cast(name, dtype) for name in kept}
        for site in sites:
            prefix = site_prefix(checkpoint.family, site)
            tensors |= {f"{prefix}{k}": v for k, v in ffn_tensors(site.number).items()}
        return tensors

    return Part(_sizes(checkpoint, kept, dtype) | sizes, load)


def _sizes(checkpoint: Checkpoint, names: Sequence[str], dtype: torch.dtype) -> dict[str, int]:
    return {
        name: math.prod(checkpoint.shape(name)) * stored_dtype(name, dtype).itemsize
        for name in names
    }
