from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import NAMES, tiny_llama, write_gguf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from weaver.errors import WeaverError
from weaver.models import gguf as gguf_input
from weaver.models.gguf import SOURCE_FILE, dequantise, is_dequantised
from weaver.stages.model_card import base_license


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_quantised_weights(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tied: bool
) -> None:
    model = tiny_llama(tied=tied)
    path = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer)
    folder = dequantise(path, tmp_path / "out" / "tiny", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.eos_token_id == 257
    assert base_license(folder) == "apache-2.0"


def test_the_folder_is_an_ordinary_model(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), tiny_tokenizer)
    folder = dequantise(path, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hqzé")["input_ids"] == [0x68, 259, 0xC3, 0xA9]
    assert tokenizer.eos_token_id == 257
    assert is_dequantised(folder)
    assert not is_dequantised(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny", "tiny.gguf"]


def test_a_complete_folder_is_kept_and_another_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), tiny_tokenizer)
    folder = dequantise(path, tmp_path / "tiny")
    monkeypatch.setattr(gguf_input, "_load", lambda *_: pytest.fail("loaded again"))
    assert dequantise(path, folder) == folder
    with pytest.raises(WeaverError, match=r"was made from .*bfloat16.*, not from .*float32"):
        dequantise(path, folder, dtype=torch.float32)
    (folder / SOURCE_FILE).unlink()
    with pytest.raises(WeaverError, match="holds no dequantised model"):
        dequantise(path, folder)


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(_self: object, folder: Path, **_options: object) -> None:
        assert any(folder.iterdir())  # The weights are there already, under the temporary name.
        raise OSError(28, os.strerror(28))

    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), tiny_tokenizer)
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fill_disk)
    with pytest.raises(WeaverError, match="cannot be written") as caught:
        dequantise(path, tmp_path / "tiny")
    assert "No space left" in caught.value.why
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(WeaverError, match=r"not a GGUF file, it starts with b'PK"):
        dequantise(path, tmp_path / "out")
    with pytest.raises(WeaverError, match="no such file"):
        dequantise(tmp_path / "missing.gguf", tmp_path / "out")


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "abacus")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeaverError, match=r"odd\.gguf: transformers .* cannot load it") as caught:
        dequantise(path, tmp_path / "out")
    assert "abacus" in caught.value.why
    assert not (tmp_path / "out").exists()


def test_a_truncated_file(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), tiny_tokenizer)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(WeaverError, match=r"tiny\.gguf: damaged header") as caught:
        dequantise(path, tmp_path / "out")
    assert "that its tensors need" in caught.value.why
    assert not (tmp_path / "out").exists()


def _number(value: int, layout: str = "<Q") -> bytes:
    return struct.pack(layout, value)


def _name(text: bytes) -> bytes:
    return _number(len(text)) + text


def _header(tensors: int = 0, fields: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + _number(3, "<I") + _number(tensors) + _number(fields) + rest


def _tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sizes = b"".join(map(_number, shape))
    return _name(name) + _number(len(shape), "<I") + sizes + _number(kind, "<I") + _number(offset)


_NESTED = b"".join(_number(9, "<I") + _number(1) for _ in range(6))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"GGUF", "behind the end"),
        (b"GGUF" + _number(9, "<I") + bytes(16), "version 9"),
        (_header(tensors=2**60), "tensors, more than"),
        (_header(fields=2**60), "fields, more than"),
        (_header(fields=1, rest=_number(2**62)), "bytes of a name"),
        (_header(fields=1, rest=_name(b"a") + _number(8, "<I") + _number(2**40)), "bytes of a na"),
        (_header(fields=1, rest=_name(b"a") + _number(77, "<I")), "unknown type 77"),
        (
            _header(fields=1, rest=_name(b"a") + _number(9, "<I") + _number(0, "<I") + b"\xff" * 8),
            "values in arrays",
        ),
        (_header(fields=1, rest=_name(b"a") + _number(9, "<I") + _NESTED), "more than 4 deep"),
        (
            _header(fields=1, rest=_name(b"general.alignment") + _number(4, "<I") + bytes(4)),
            "alignment of 0",
        ),
        (_header(1, rest=_tensor(b"a", (1,) * 9, 0, 0)), "dimensions of 'a'"),
        (_header(1, rest=_tensor(b"a", (4,), 999, 0)), "unknown type 999"),
        (_header(1, rest=_tensor(b"a", (4,), 8, 0)), "does not fill its blocks"),
        (_header(1, rest=_tensor(b"a", (2**62, 2**62), 0, 0)), "that its tensors need"),
        (_header(1, rest=_tensor(b"a", (4,), 0, 2**62)), "that its tensors need"),
        (_header(1, rest=_tensor(b"\xff", (4,), 0, 0)), "can't decode"),
        (_header(2, rest=_tensor(b"a", (4,), 0, 0) * 2 + bytes(99)), "stands there twice"),
        (
            _header(2, rest=_tensor(b"a", (4,), 0, 0) + _tensor(b"b", (4,), 0, 0) + bytes(99)),
            "two tensors share",
        ),
    ],
)
def test_a_hostile_header_is_refused_before_a_library_reads_it(
    content: bytes, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_input, "_load", lambda *_: pytest.fail("read by a library"))
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(WeaverError, match=r"bad\.gguf: damaged header") as caught:
        dequantise(path, tmp_path / "out")
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("add_block_count", 1), "a model of 1 layers"),
        (("add_block_count", 2**32 - 1), "num_hidden_layers is"),
        (("add_feed_forward_length", 10**9), "intermediate_size is"),
        (("add_feed_forward_length", 10**6), "a model of 384"),
        (("add_context_length", 0), "max_position_embeddings is 0"),
    ],
)
def test_fields_that_describe_another_model(
    change: tuple[str, int],
    message: str,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, value = change
    right = getattr(gguf.GGUFWriter, name)
    monkeypatch.setattr(gguf.GGUFWriter, name, lambda self, _: right(self, value))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), tiny_tokenizer)
    with pytest.raises(WeaverError) as caught:
        dequantise(path, tmp_path / "out")
    assert message in caught.value.what


def test_a_layer_without_one_of_its_tensors(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(NAMES, "mlp.up_proj")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True), tiny_tokenizer)
    with pytest.raises(WeaverError, match=r"describe a model of model\.layers\.0\.mlp\.up_proj"):
        dequantise(path, tmp_path / "out")
