"""Shards: their sizes, their plan, their index, and a sharded model that loads."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_conversions import (
    OpenTiny,
    load_converted,
    random_conversions,
    shapes_of,
    write_converted,
)
from tiny_models import TINY, random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.models.moe import converted_tensors
from weaver.models.writing import (
    INDEX_FILE,
    Part,
    converted_parts,
    parse_size,
    plan_shards,
    shard_names,
    write_shards,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1.5kb", 1500),
        (" 2 GiB ", 2 * 1024**3),
        ("3MiB", 3 * 1024**2),
        ("4KIB", 4096),
        (".5GB", 500_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "5", "GB", "0GB", "-1GB", "5 TB", "1.2.3GB", "infGB", "1e3MB", "²GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(WeaverError, match="is not understood") as caught:
        parse_size(text)
    assert "--max-shard-size" in caught.value.fix


def part(name: str, count: int) -> Part:
    """A part of one float32 tensor of ``count`` values."""
    return Part({name: 4 * count}, lambda: {name: torch.arange(float(count))})


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(1, 400))
def test_shards_keep_the_order_and_the_limit(counts: list[int], limit: int) -> None:
    parts = [part(str(i), count) for i, count in enumerate(counts)]
    shards = plan_shards(parts, limit)
    assert [p for shard in shards for p in shard] == parts
    assert all(shard for shard in shards)
    assert all(sum(p.size for p in shard) <= limit for shard in shards if len(shard) > 1)
    for before, after in pairwise(shards):
        assert sum(p.size for p in before) + after[0].size > limit


def test_a_plan_by_hand() -> None:
    parts = [part("a", 5), part("b", 5), part("c", 1), part("d", 30), part("e", 1)]
    plan = plan_shards(parts, 40)
    assert [len(shard) for shard in plan] == [2, 1, 1, 1]
    assert [len(shard) for shard in plan_shards(parts, 44)] == [3, 1, 1]


def test_names() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_one_file_has_no_index(tmp_path: Path) -> None:
    seen: list[str] = []
    write_shards(tmp_path, [part("a", 3), part("b", 2)], 100, seen.append)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"] == seen
    assert torch.equal(load_file(tmp_path / "model.safetensors")["b"], torch.tensor([0.0, 1.0]))


def test_the_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [part("b", 3), part("a", 2), part("c", 4)], 20, lambda _name: None)
    assert json.loads((tmp_path / INDEX_FILE).read_text()) == {
        "metadata": {"total_size": 36},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }
    assert sorted(load_file(tmp_path / "model-00001-of-00002.safetensors")) == ["a", "b"]


def failing(name: str) -> Part:
    def load() -> dict[str, Tensor]:
        raise RuntimeError("stop here")

    return Part({name: 40}, load)


def test_finished_shards_are_kept(tmp_path: Path) -> None:
    """An interrupted run leaves whole shards; the next one makes only those that are missing."""
    with pytest.raises(RuntimeError, match="stop here"):
        write_shards(tmp_path, [part("a", 10), failing("b")], 40, lambda _name: None)
    assert [path.name for path in tmp_path.iterdir()] == ["model-00001-of-00002.safetensors"]
    seen: list[str] = []
    write_shards(tmp_path, [failing("a"), part("b", 10)], 40, seen.append)
    assert seen == shard_names(2)
    assert torch.equal(load_file(tmp_path / seen[0])["a"], torch.arange(10.0))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_shard_is_not_kept_in_silence(tmp_path: Path) -> None:
    parts = [part("a", 10), part("b", 10)]
    write_shards(tmp_path, parts, 40, lambda _name: None)
    first = tmp_path / shard_names(2)[0]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(WeaverError, match=r"00001-of-00002\.safetensors: damaged") as caught:
        write_shards(tmp_path, parts, 40, lambda _name: None)
    assert caught.value.fix.startswith(f"rm {first}")


@pytest.mark.parametrize("variant", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_as_large_as_they_say(
    open_tiny: OpenTiny, variant: str, dtype: torch.dtype
) -> None:
    checkpoint = open_tiny(variant)
    conversions = random_conversions(checkpoint, shared=8, experts=5, top_k=2, kind="glu")
    parts = converted_parts(
        checkpoint,
        shapes_of(checkpoint, conversions),
        lambda layer: converted_tensors(checkpoint.ffn(layer, dtype), *conversions[layer]),
        dtype,
    )
    assert len(parts) == 1 + checkpoint.num_layers
    for each in parts:
        tensors = each.load()
        assert {name: t.numel() * t.itemsize for name, t in tensors.items()} == each.sizes
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


@pytest.mark.parametrize("variant", TINY)
def test_a_sharded_model_loads_completely(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    checkpoint = open_tiny(variant)
    conversions = random_conversions(checkpoint, shared=8, experts=5, top_k=2)
    one = write_converted(checkpoint, tmp_path / "one", conversions)
    many = write_converted(checkpoint, tmp_path / "many", conversions, limit=40_000)
    assert len(list(many.glob("*.safetensors"))) > 2
    loaded: Any = AutoModelForCausalLM.from_pretrained(many, output_loading_info=True)
    model, info = loaded
    assert {kind: sorted(keys) for kind, keys in info.items() if keys} == {}
    ids_WT = random_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids_WT).logits, load_converted(one)(ids_WT).logits)


def test_a_tied_head_is_not_written_twice(open_tiny: OpenTiny, tmp_path: Path) -> None:
    path = open_tiny("qwen2").folder / "model.safetensors"
    stored = load_file(path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, path, metadata={"format": "pt"})
    checkpoint = Checkpoint(ModelConfig(path=str(path.parent)))
    assert "lm_head.weight" in checkpoint.names()
    conversions = random_conversions(checkpoint, shared=8, experts=5, top_k=2)
    folder = write_converted(checkpoint, tmp_path / "moe", conversions)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_converted(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
