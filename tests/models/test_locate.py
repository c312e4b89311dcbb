"""Which files a model's name stands for, and what is said when there are none."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from tiny_conversions import OpenTiny
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerFast

from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.models import locate as locate_module
from weaver.models.checkpoint import Checkpoint
from weaver.models.locate import locate, weight_files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_one_file_goes_before_the_index_and_that_before_other_files(tmp_path: Path) -> None:
    touch(tmp_path, "consolidated.safetensors", "model-1-of-2.safetensors", "b.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == [
        "b.safetensors",
        "consolidated.safetensors",
        "model-1-of-2.safetensors",
    ]
    weight_map = {"x": "model-2-of-2.safetensors", "y": "model-1-of-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**weight_map, "z": "model-1-of-2.safetensors"}}))
    assert weight_files(tmp_path) == [
        tmp_path / "model-1-of-2.safetensors",
        tmp_path / "model-2-of-2.safetensors",
    ]
    touch(tmp_path, "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": ["a"]}', "{"])
def test_a_damaged_index(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WeaverError, match=r"index\.json: damaged"):
        weight_files(tmp_path)


def test_a_missing_shard(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    save_tiny_model("llama", tmp_path, tiny_tokenizer, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(WeaverError, match=rf"{shard.name}: missing") as caught:
        Checkpoint(ModelConfig(path=str(tmp_path)))
    assert caught.value.fix.startswith(f"fetch {shard.name}")


def test_no_safetensors(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match=r"no \*\.safetensors file\n") as caught:
        weight_files(tmp_path)
    assert caught.value.fix == "fetch the model's *.safetensors files"


def test_pickled_weights_are_refused_and_the_advice_converts_them(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "a model"
    save_tiny_model("llama", folder, tiny_tokenizer)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(WeaverError, match=r"its weights lie in pytorch_model\.bin") as caught:
        weight_files(folder)
    advice = caught.value.fix.removesuffix(", if you trust them")
    subprocess.run([sys.executable, *shlex.split(advice)[1:]], check=True)
    assert Checkpoint(ModelConfig(path=str(folder))).names()


def test_a_folder_and_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEAVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate_module, "dequantise", lambda _path, folder: folder)
    assert locate(ModelConfig(path=str(tmp_path))) == tmp_path.resolve()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    found = locate(ModelConfig(path=str(tmp_path / "m.gguf")))
    # SHA-256 of the four bytes: another file goes into another folder.
    assert found == tmp_path / "cache" / f"gguf-{hashlib.sha256(b'GGUF').hexdigest()[:16]}"


@pytest.mark.parametrize("path", ["no/such/folder", "missing.gguf", "/no/such", "no-such-model"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        locate_module, "snapshot_download", lambda *_args, **_: pytest.fail("asked the hub")
    )
    with pytest.raises(WeaverError, match=f"{path}: no such model"):
        locate(ModelConfig(path=path))


def test_a_typing_error_next_to_real_folders_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeaverError, match="models/smollm2: no such model"):
        locate(ModelConfig(path="models/smollm2"))


@pytest.mark.parametrize("name", ["owner/name", "Qwen/Qwen2.5-0.5B"])
def test_a_hub_name_goes_to_the_hub_with_its_revision(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, asked = open_tiny("llama").folder, []

    def download(*args: object, **options: Any) -> str:
        asked.append((args, options["revision"]))
        assert "*.safetensors" in options["allow_patterns"]
        assert not any("bin" in pattern for pattern in options["allow_patterns"])
        return str(folder)

    monkeypatch.setattr(locate_module, "snapshot_download", download)
    checkpoint = Checkpoint(ModelConfig(path=name, revision="v1.2"))
    assert asked == [((name,), "v1.2")]
    identity = checkpoint.identity()
    assert (identity.path, identity.folder, identity.revision) == (name, str(folder), "v1.2")


def test_a_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_args: object, **_options: object) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nmore about it")

    monkeypatch.setattr(locate_module, "snapshot_download", download)
    with pytest.raises(WeaverError, match="owner/name: not a local folder, and the hub") as caught:
        locate(ModelConfig(path="owner/name"))
    assert caught.value.why == "cannot reach the hub"
    assert "--revision" in caught.value.fix
