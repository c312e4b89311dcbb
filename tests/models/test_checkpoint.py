"""A dense model on disk: its tensors, its FFNs as neurons, its size and its identity."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversions import OpenTiny
from tiny_models import TINY, save_tiny_model
from transformers import PreTrainedTokenizerFast

from weaver.algorithms.glu import glu_forward
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.models import checkpoint as checkpoint_module
from weaver.models.checkpoint import Checkpoint


def reopen(folder: Path) -> Checkpoint:
    return Checkpoint(ModelConfig(path=str(folder)))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (with None) remove tensors; ``__`` stands for a dot."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor | None] = dict(load_file(path))
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize("variant", TINY)
def test_the_ffn_computes_what_the_module_of_transformers_does(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, variant: str
) -> None:
    model = save_tiny_model(variant, tmp_path, tiny_tokenizer)
    checkpoint = reopen(tmp_path)
    assert (checkpoint.num_layers, checkpoint.hidden_size) == (3, 32)
    x_TD = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    for layer in range(3):
        weights = checkpoint.ffn(layer, torch.float32)
        assert weights.intermediate_size == checkpoint.intermediate_size == 48
        assert weights.down_FD.shape == (48, 32)
        with torch.no_grad():
            expected_TD = model.get_submodule(f"model.layers.{layer}.mlp")(x_TD)
        torch.testing.assert_close(glu_forward(x_TD, weights), expected_TD, rtol=1e-5, atol=1e-5)


def test_biases_are_found(open_tiny: OpenTiny) -> None:
    weights = open_tiny("llama+bias").ffn(1, torch.float32)
    assert weights.gate_bias_F is not None
    assert weights.gate_bias_F.shape == (48,)
    assert weights.up_bias_F is not None
    assert not torch.equal(weights.gate_bias_F, weights.up_bias_F)
    assert weights.output_bias_D is not None
    assert weights.output_bias_D.shape == (32,)
    plain = open_tiny("llama").ffn(1, torch.float32)
    assert plain.gate_bias_F is plain.up_bias_F is plain.output_bias_D is None


def test_a_fused_projection_is_halved(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("phi3")
    fused = checkpoint.tensor("model.layers.2.mlp.gate_up_proj.weight")
    weights = checkpoint.ffn(2, torch.float32)
    assert torch.equal(weights.gate_FD, fused[:48])
    assert torch.equal(weights.up_FD, fused[48:])


@pytest.mark.parametrize("variant", ["llama", "phi3"])
def test_a_sharded_checkpoint_is_the_same_model(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, variant: str
) -> None:
    save_tiny_model(variant, tmp_path / "one", tiny_tokenizer)
    save_tiny_model(variant, tmp_path / "many", tiny_tokenizer, max_shard_size="30KB")
    one, many = reopen(tmp_path / "one"), reopen(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert many.names() == one.names()
    assert many.total_parameters() == one.total_parameters()
    assert all(torch.equal(many.tensor(name), one.tensor(name)) for name in one.names())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(open_tiny: OpenTiny, dtype: torch.dtype) -> None:
    checkpoint = open_tiny("llama", dtype=dtype)
    assert checkpoint.dtype == checkpoint.resolve_dtype("auto") == dtype
    assert checkpoint.resolve_dtype("bfloat16") == torch.bfloat16
    stored = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    assert stored.dtype == dtype
    assert torch.equal(checkpoint.ffn(0, torch.float32).up_FD, stored.float())
    state = checkpoint.layer_state(0, torch.float64)
    assert {tensor.dtype for tensor in state.values()} == {torch.float64}


def test_names_are_divided_into_layers_ffns_and_the_rest(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("gemma2", num_hidden_layers=11, layer_types=["full_attention"] * 11)
    layer_1 = checkpoint.layer_names(1)
    assert len(layer_1) == 11  # Not those of layer 10.
    assert {name for name in layer_1 if checkpoint.is_ffn(name)} == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }
    assert checkpoint.outer_names() == ["model.embed_tokens.weight", "model.norm.weight"]
    assert "pre_feedforward_layernorm.weight" in checkpoint.layer_state(1, torch.float32)
    assert not any(name.startswith("mlp") for name in checkpoint.layer_state(1, torch.float32))
    assert len(checkpoint.names()) == 11 * 11 + 2


@pytest.mark.parametrize("variant", TINY)
def test_total_parameters_are_those_of_the_model(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, variant: str
) -> None:
    model = save_tiny_model(variant, tmp_path, tiny_tokenizer)
    assert reopen(tmp_path).total_parameters() == sum(p.numel() for p in model.parameters())


def test_a_tied_head_that_is_stored_twice_counts_once(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("llama")
    before = checkpoint.total_parameters()
    embeddings = checkpoint.tensor("model.embed_tokens.weight")
    edit_weights(checkpoint.folder, lm_head__weight=embeddings.clone())
    again = reopen(checkpoint.folder)
    assert "lm_head.weight" in again.names()
    assert again.total_parameters() == before


def test_rotary_frequencies_of_early_checkpoints_are_left_out(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("llama")
    before = checkpoint.names()
    edit_weights(checkpoint.folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert reopen(checkpoint.folder).names() == before


def test_identity_stays_with_the_content(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    save_tiny_model("llama", tmp_path / "a", tiny_tokenizer)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, again = reopen(tmp_path / "a").identity(), reopen(tmp_path / "a").identity()
    elsewhere = reopen(tmp_path / "b").identity()
    assert first == again
    assert first.model_type == "llama"
    assert (elsewhere.digest, elsewhere.tokenizer_digest) == (first.digest, first.tokenizer_digest)
    assert elsewhere.folder != first.folder


def test_identity_changes_with_one_weight(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("llama")
    before = checkpoint.identity()
    norm = checkpoint.tensor("model.norm.weight")
    norm[7] += 1e-3
    edit_weights(checkpoint.folder, model__norm__weight=norm)
    after = reopen(checkpoint.folder).identity(before)
    assert after.digest != before.digest
    assert after.tokenizer_digest == before.tokenizer_digest


def test_identity_changes_with_the_configuration(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("llama")
    before = checkpoint.identity()
    path = checkpoint.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    assert reopen(checkpoint.folder).identity(before).digest != before.digest


def test_identity_changes_with_the_tokenizer(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("llama")
    before = checkpoint.identity()
    path = checkpoint.folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    after = reopen(checkpoint.folder).identity(before)
    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.digest == before.digest


def test_a_known_identity_saves_reading_the_weights(
    open_tiny: OpenTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_tiny("llama")
    known = checkpoint.identity()
    monkeypatch.setattr(
        checkpoint_module, "file_digest", lambda path: pytest.fail(f"{path} was read")
    )
    assert reopen(checkpoint.folder).identity(known) == known


def test_a_truncated_file(open_tiny: OpenTiny) -> None:
    path = open_tiny("llama").folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeaverError, match=f"damaged, {size - 100} bytes instead of {size}"):
        reopen(path.parent)


def test_a_file_that_is_not_safetensors(open_tiny: OpenTiny) -> None:
    path = open_tiny("llama").folder / "model.safetensors"
    path.write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(WeaverError, match=r"model\.safetensors: damaged header"):
        reopen(path.parent)


def test_no_configuration(open_tiny: OpenTiny) -> None:
    folder = open_tiny("llama").folder
    (folder / "config.json").write_text("{")
    with pytest.raises(WeaverError, match="no configuration that transformers can load"):
        reopen(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeaverError, match="no configuration that transformers can load"):
        reopen(folder)


def test_a_checkpoint_without_the_ffn(open_tiny: OpenTiny) -> None:
    folder = open_tiny("llama").folder
    edit_weights(folder, model__layers__0__mlp__gate_proj__weight=None)
    with pytest.raises(WeaverError, match=r"no GLU feed-forward found, 'model\.layers\.0\.mlp\.ga"):
        reopen(folder)


def test_a_tensor_that_is_not_there(open_tiny: OpenTiny) -> None:
    with pytest.raises(WeaverError, match=r"holds no tensor 'model\.layers\.3\.mlp\.gate_proj"):
        open_tiny("llama").tensor("model.layers.3.mlp.gate_proj.weight")


def test_quantised_weights(open_tiny: OpenTiny) -> None:
    path = open_tiny("llama").folder / "config.json"
    quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantised))
    with pytest.raises(WeaverError, match="quantised weights, quant_method 'fp8'"):
        reopen(path.parent)


def test_the_tokenizer(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("qwen2")
    assert checkpoint.tokenizer()("Aé")["input_ids"] == [0x41, 0xC3, 0xA9]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint.folder / name).unlink()
    with pytest.raises(WeaverError, match=r"qwen2: no tokenizer") as caught:
        reopen(checkpoint.folder).tokenizer()
    assert "tokenizer.json" in caught.value.fix
