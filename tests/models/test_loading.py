"""Loading whole models: what fits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversions import OpenTiny, random_conversions, write_converted
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerFast

from weaver.errors import WeaverError
from weaver.models.loading import load_model


@pytest.fixture
def folder(open_tiny: OpenTiny, tmp_path: Path) -> Path:
    """A converted Llama."""
    checkpoint = open_tiny("llama")
    conversions = random_conversions(checkpoint, shared=8, experts=5, top_k=2)
    return write_converted(checkpoint, tmp_path / "moe", conversions)


def test_a_converted_model(folder: Path) -> None:
    model = load_model(folder, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert type(model).__name__ == "WeaverLlamaForCausalLM"


def test_a_dense_model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    saved = save_tiny_model("gemma", tmp_path, tiny_tokenizer)
    model = load_model(tmp_path, torch.float32)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True)
    )


def test_auto_is_the_dtype_that_is_stored(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    save_tiny_model("llama", tmp_path, tiny_tokenizer, torch.bfloat16)
    assert load_model(tmp_path, "auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.router.scale", None, "missing_keys.*router.scale"),
        ("model.layers.1.mlp.odd", torch.ones(2), "unexpected_keys.*mlp.odd"),
        ("model.layers.1.mlp.router.weight", torch.ones(4, 32), "router.weight|cannot be loaded"),
    ],
)
def test_weights_that_do_not_fit(
    folder: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(WeaverError, match=message) as caught:
        load_model(folder, torch.float32)
    assert "--force" in caught.value.fix


def test_a_truncated_model(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeaverError, match="moe: cannot be loaded"):
        load_model(folder, torch.float32)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="cannot be loaded") as caught:
        load_model(tmp_path, torch.float32, fix="name another one")
    assert caught.value.fix == "name another one"
