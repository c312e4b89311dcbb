"""A model's folder is checked before any stage uses it: one error, before anything is computed."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.models.intake import check_windows, load_tokenizer
from weaver.models.loading import load_model
from weaver.models.writing import copy_companions

GATE = "model.layers.1.mlp.gate_proj.weight"
Damage = Callable[[Path], object]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def _config(**changes: Any) -> Damage:
    def damage(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _raw(name: str, text: str) -> Damage:
    return lambda model: (model / name).write_text(text)


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(model: Path) -> None:
        path = model / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return damage


def _header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Replace the header of the weights by another one, its length included."""

    def damage(model: Path) -> None:
        path = model / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        changed = change(json.loads(content[8 : 8 + length]))
        header = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

    return damage


def _entry(**changes: Any) -> Damage:
    return _header(lambda header: header | {GATE: header[GATE] | changes})


def _deep(header: dict[str, Any]) -> bytes:
    return b'{"a":' * 100_000 + b"1" + b"}" * 100_000


DAMAGE: dict[str, tuple[Damage, str]] = {
    "neurons": (_config(intermediate_size=48), r"gate_proj.weight' has shape \[64, 32\], .*\[48"),
    "many neurons": (_config(intermediate_size=10**9), r"intermediate_size is 1000000000"),
    "vocabulary": (_config(vocab_size=2**31), r"vocab_size is 2147483648"),
    "embedding": (_config(vocab_size=300), r"embed_tokens.weight' has shape \[260, 32\]"),
    "fewer layers": (_config(num_hidden_layers=3), r"weights of 4 layers, config.json says 3"),
    "more layers": (_config(num_hidden_layers=5), r"weights of 4 layers, config.json says 5"),
    "heads": (_config(num_attention_heads=8, head_dim=16), r"q_proj.weight' has shape"),
    "no heads": (_config(num_attention_heads=0), r"num_attention_heads is 0"),
    "text for a size": (_config(hidden_size="32"), r"hidden_size is '32'"),
    "truth for a size": (_config(hidden_size=True), r"hidden_size is True"),
    "fraction": (_config(num_hidden_layers=4.5), r"num_hidden_layers is 4.5"),
    "epsilon": (_config(rms_norm_eps=-1e-6), r"rms_norm_eps is -1e-06"),
    "no number": (_config(rope_theta=float("nan")), r"rope_theta is nan"),
    "infinity": (_config(anything={"deep": [float("inf")]}), r"anything.deep is inf"),
    "type": (_config(model_type=["llama"]), "no configuration that transformers"),
    "strict field": (_config(attention_dropout="much"), "no configuration|describes no model"),
    "rope": (_config(rope_parameters={"rope_type": "no such"}), "no configuration|describes no"),
    "list": (_raw("config.json", "[]"), "no configuration that transformers"),
    "nested": (_raw("config.json", '{"a":' * 9999 + "1" + "}" * 9999), "no configuration"),
    "digits": (_raw("config.json", '{"hidden_size": ' + "9" * 6000 + "}"), "no configuration"),
    "surrogate": (_raw("config.json", '{"model_type": "\\ud800"}'), "no configuration"),
    "bytes": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), "no configuration"),
    "no gate": (
        _tensors(lambda ts: {k: v for k, v in ts.items() if k != GATE}),
        rf"no GLU feed-forward found, '{GATE}' is missing",
    ),
    "no norm": (
        _tensors(lambda ts: {k: v for k, v in ts.items() if k != "model.norm.weight"}),
        r"holds no tensor 'model.norm.weight'",
    ),
    "down": (
        _tensors(lambda ts: ts | {GATE.replace("gate", "down"): torch.ones(32, 63)}),
        r"down_proj.weight' has shape \[32, 63\]",
    ),
    "deep header": (_header(_deep), "damaged header"),
    "no header": (_header(lambda _: []), "damaged header"),
    "dtype": (_entry(dtype="F31"), "damaged header"),
    "negative": (_entry(shape=[-64, -32]), "damaged header"),
    "shape": (_entry(shape=[64, 33]), "damaged header"),
    "huge": (_entry(shape=[2**62, 4]), "damaged header"),
    "offsets": (_entry(data_offsets=[0, 2**60]), "damaged header"),
    "overlap": (_entry(data_offsets=[0, 8192]), "damaged header"),
    "no offsets": (_header(lambda h: h | {GATE: {"dtype": "F32"}}), "damaged header"),
    "length": (
        lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64),
        "damaged header",
    ),
    "digits in a name": (
        _tensors(lambda ts: ts | {f"model.layers.{'9' * 5000}.x": torch.ones(1)}),
        "",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_a_model_whose_parts_do_not_agree(damage: Damage, expected: str, model: Path) -> None:
    damage(model)
    if not expected:
        Checkpoint(ModelConfig(path=str(model)))
        return
    with pytest.raises(WeaverError) as caught:
        Checkpoint(ModelConfig(path=str(model)))
    assert re.search(expected, caught.value.what), str(caught.value)
    assert len(str(caught.value)) < 2000


def _tokenizer(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(model: Path) -> None:
        path = model / "tokenizer.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(change(values)))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _raw("tokenizer.json", ""),
        _raw("tokenizer.json", "[" * 99_999),
        _raw("tokenizer_config.json", "{"),
        _raw("tokenizer_config.json", "3"),
        _raw("tokenizer.json", "[]"),
        _tokenizer(lambda t: t | {"model": {"type": "no such"}}),
        _tokenizer(lambda t: t | {"model": t["model"] | {"vocab": {"a": -1}}}),
        _tokenizer(lambda t: t | {"model": t["model"] | {"merges": [["x", "y"]]}}),
        _tokenizer(lambda t: t | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}),
        _tokenizer(lambda t: t | {"added_tokens": [{"id": "x"}]}),
    ],
)
def test_a_tokenizer_that_nobody_can_load(damage: Damage, model: Path) -> None:
    damage(model)
    with pytest.raises(WeaverError, match="no tokenizer"):
        load_tokenizer(model)


def test_more_tokens_and_places_than_the_model_has(model: Path) -> None:
    config = Checkpoint(ModelConfig(path=str(model))).config
    check_windows(config, torch.full((1, 512), 259), what="m")
    with pytest.raises(WeaverError, match="m: the tokenizer gives token 260"):
        check_windows(config, torch.full((1, 8), 260), what="m")
    with pytest.raises(WeaverError, match="m: windows of 513 tokens") as caught:
        check_windows(config, torch.zeros(1, 513, dtype=torch.int64), what="m")
    assert caught.value.fix == "--sequence-length 512"


@pytest.mark.parametrize("name", ["../stranger.safetensors", "/tmp/stranger.safetensors"])
def test_an_index_does_not_lead_out_of_the_folder(name: str, model: Path) -> None:
    shutil.copy(model / "model.safetensors", model.parent / "stranger.safetensors")
    weight_map = dict.fromkeys(load_file(model / "model.safetensors"), name)
    (model / "model.safetensors").unlink()
    index = {"weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for opened in (
        lambda: Checkpoint(ModelConfig(path=str(model))),
        lambda: load_model(model, torch.float32),
    ):
        with pytest.raises(WeaverError, match=r"stranger\.safetensors' lies outside"):
            opened()


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt", "generation_config.json"])
def test_a_link_copies_nothing_from_elsewhere(name: str, model: Path) -> None:
    secret = model.parent / "secret"
    secret.write_text("a private key")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(WeaverError, match=f"'{name}' lies outside, at {secret}"):
        Checkpoint(ModelConfig(path=str(model)))
    (model.parent / "out").mkdir()
    with pytest.raises(WeaverError, match="lies outside"):
        copy_companions(model, model.parent / "out")
    assert not (model.parent / "out" / name).exists()


def test_links_inside_the_folder_and_those_of_the_hubs_cache_are_followed(model: Path) -> None:
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights" / "a")
    (model / "model.safetensors").symlink_to("weights/a")
    Checkpoint(ModelConfig(path=str(model)))

    cache = model.parent / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    (model / "weights" / "a").rename(cache / "blobs" / "a")
    (model / "model.safetensors").unlink()
    snapshot = Path(shutil.copytree(model, cache / "snapshots" / "1"))
    (snapshot / "model.safetensors").symlink_to("../../blobs/a")
    Checkpoint(ModelConfig(path=str(snapshot)))


def test_a_file_without_the_right_to_read_is_not_called_damaged(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is root may read everything, so the refusal is made up."""
    opened = Path.open

    def refused(self: Path, *arguments: Any, **named: Any) -> Any:
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(WeaverError, match=r"model\.safetensors: cannot be read") as caught:
        Checkpoint(ModelConfig(path=str(model)))
    assert caught.value.why == "Permission denied"
    assert "fetch" not in caught.value.fix


def test_thousands_of_tensors_are_opened_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weaver.models import tensors

    opened: list[Path] = []

    def counted(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr(tensors, "safe_open", counted)
    checkpoint = Checkpoint(ModelConfig(path=str(model)))
    for name in checkpoint.names():
        checkpoint.tensor(name)
        checkpoint.shape(name)
    assert len(opened) == 1
