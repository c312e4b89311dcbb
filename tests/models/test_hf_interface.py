"""Interfaces of a converted model that transformers, accelerate, torch and servers rely on."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from featured_models import FEATURES, write_featured
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_conversions import OpenTiny, ffns_of, load_converted
from tiny_models import TINY, random_ids
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.masking_utils import eager_mask

from weaver.algorithms.glu import glu_forward
from weaver.kernels import ops
from weaver.models.accounting import LayerShape
from weaver.models.hf import CONVERTED, register
from weaver.models.moe import MoEFeedForward

IDS_WT = random_ids(2, 20)


@pytest.fixture
def folder(open_tiny: OpenTiny, tmp_path: Path) -> Path:
    """A Llama whose layers have three different shapes."""
    return write_featured(open_tiny("llama+bias"), "mixed", tmp_path / "moe")


def load(folder: Path, **options: Any) -> PreTrainedModel:
    register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def logits(model: Any, ids_WT: Tensor = IDS_WT, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids_WT, **arguments).logits
    return found


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in ours
    )


def gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(IDS_WT, labels=IDS_WT).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(folder: Path) -> None:
    model = load(folder)
    model.train()
    assert model.supports_gradient_checkpointing
    loss, expected = gradients(model)
    calls = []
    ffns_of(model)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    again, found = gradients(model)
    assert len(calls) == 2, "the layer was not computed again in the backward pass"
    assert again == loss
    assert found.keys() == expected.keys()
    assert {"model.layers.0.mlp.router.scale", "model.layers.2.mlp.down_weight"} < found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_with_a_cache_and_without(folder: Path, cache: str) -> None:
    model = load(folder)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    without = model.generate(IDS_WT, **options, use_cache=False)  # type: ignore[operator]
    found = model.generate(IDS_WT, **options, cache_implementation=cache)  # type: ignore[operator]
    assert found.shape == (2, 28)
    assert torch.equal(found, without)


def test_a_pipeline_from_the_folder(
    folder: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_tokenizer.save_pretrained(folder)
    register()
    # transformers' logger does not hand its messages on.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    writer = pipeline("text-generation", model=str(folder))
    assert type(writer.model) is CONVERTED["llama"].causal_lm
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    [found] = writer("a cat", **options, return_full_text=False)
    prompt_WT = tiny_tokenizer("a cat", return_tensors="pt").input_ids
    expected = load(folder).generate(prompt_WT, **options)  # type: ignore[operator]
    new = expected[0, prompt_WT.shape[1] :]
    assert found["generated_text"] == tiny_tokenizer.decode(new, skip_special_tokens=True)
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "cpu"])
def test_device_maps(folder: Path, device_map: Any) -> None:
    model = load(folder, device_map=device_map)
    assert torch.equal(logits(model), logits(load(folder)))
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("feature", FEATURES)
def test_layers_on_disk(
    open_tiny: OpenTiny, tmp_path: Path, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are fetched when a module is called, those of the router too."""
    folder = write_featured(open_tiny("llama+bias"), feature, tmp_path / "moe")
    places = {f"model.layers.{layer}": "disk" for layer in range(3)}
    others = dict.fromkeys(
        ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu"
    )
    model = load(folder, device_map=places | others, offload_folder=tmp_path / "offload")
    ffn = ffns_of(model)[2]
    assert ffn.router is not None
    assert ffn.gate_weight.is_meta
    assert ffn.router.weight.is_meta
    assert torch.equal(logits(model), logits(load(folder)))
    assert ffn.router.weight.is_meta


@pytest.mark.slow
def test_compiling_changes_nothing(folder: Path) -> None:
    """Without inductor, which takes minutes: what torch.compile captures and what it leaves."""
    model = load(folder)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    found_WTV = logits(compiled, use_cache=False)
    torch.testing.assert_close(found_WTV, logits(model), rtol=1e-6, atol=1e-6)
    loss, expected = gradients(model)
    again, found = gradients(compiled)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[f"_orig_mod.{name}"], gradient, rtol=1e-5, atol=1e-6, msg=name
        )
    torch.compiler.reset()
    with pytest.raises(Unsupported, match=r"torch\.compiler\.disable"):
        logits(torch.compile(model, backend="eager", fullgraph=True), use_cache=False)
    torch.compiler.reset()


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
@pytest.mark.parametrize("variant", TINY)
def test_saving_and_loading_keeps_every_bit(
    open_tiny: OpenTiny, tmp_path: Path, variant: str, shard: str
) -> None:
    dtype = torch.bfloat16
    first = write_featured(open_tiny(variant, dtype=dtype), "mixed", tmp_path / "moe", dtype)
    model = load_converted(first)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    written = list((tmp_path / "again").glob("*.safetensors"))
    assert (len(written) > 3) is (shard == "8KB")
    again = load_converted(tmp_path / "again")
    assert type(again) is type(model)
    assert same_tensors(again, model)
    assert torch.equal(logits(again), logits(model))
    path = {"_name_or_path"}
    ours, theirs = again.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in ours.items() if k not in path} == {
        k: v for k, v in theirs.items() if k not in path
    }
    # Saved once more, the same bytes.
    again.save_pretrained(tmp_path / "third", max_shard_size=shard)
    for file in written:
        assert (tmp_path / "third" / file.name).read_bytes() == file.read_bytes()
    config = (tmp_path / "third" / "config.json").read_text()
    assert config == (tmp_path / "again" / "config.json").read_text()


def test_pushing_to_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By inheritance: what is handed over is what ``save_pretrained`` writes, and a card."""
    model: Any = load(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    sent: dict[str, bytes] = {}

    class Repository:
        repo_id = "someone/moe"

    def create_commit(_: HfApi, repo_id: str, operations: Any, **__: Any) -> str:
        assert repo_id == Repository.repo_id
        for operation in operations:
            with operation.as_file() as handle:
                sent[operation.path_in_repo] = handle.read()
        return "done"

    def no_card(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no card yet")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository())
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    assert model.push_to_hub("someone/moe", max_shard_size="8KB") == "done"
    card = sent.pop("README.md")
    assert b"transformers" in card
    written = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert sent == written
    assert json.loads(sent["config.json"])["model_type"] == "weaver_llama"


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "phi3"])
def test_eager_and_sdpa_attention(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    folder = write_featured(open_tiny(variant), "mixed", tmp_path / "moe")
    found = []
    for name in ("eager", "sdpa"):
        model = load(folder, attn_implementation=name)
        assert model.config._attn_implementation == name
        found.append(logits(model))
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model), found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", TINY)
def test_the_backbone_takes_what_a_server_hands_to_attention(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    """As vLLM's transformers backend does: ``AutoModel``, attention of its own, its arguments."""
    seen: list[object] = []

    def attention(module: nn.Module, *arguments: Any, instances: object, **options: Any) -> Any:
        seen.append(instances)
        family = sys.modules[type(module).__module__]
        return family.eager_attention_forward(module, *arguments, **options)

    AttentionInterface.register("of_a_server", attention)
    AttentionMaskInterface.register("of_a_server", eager_mask)
    folder = write_featured(open_tiny(variant), "mixed", tmp_path / "moe")
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "of_a_server"
    backbone = AutoModel.from_pretrained(folder, config=config)
    assert type(backbone) is CONVERTED[config.model_type.removeprefix("weaver_")].backbone
    assert type(backbone).is_backend_compatible()
    # No number of experts that a server could take for one shape of all layers.
    names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    assert not any(hasattr(config, name) for name in names)
    positions_WT = torch.arange(20).expand(2, 20)
    arguments: dict[str, Any] = {"position_ids": positions_WT, "use_cache": False}
    with torch.no_grad():
        [found] = backbone(IDS_WT, **arguments, instances="theirs", return_dict=False)
        causal = load(folder, attn_implementation="eager")
        expected = causal.base_model(IDS_WT, **arguments).last_hidden_state
    assert seen == ["theirs"] * 3
    assert torch.equal(found, expected)


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_experts_are_the_routed_part_of_the_forward(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feature: str, path: str
) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    model = load(write_featured(open_tiny("llama+bias"), feature, tmp_path / "moe"))
    x_WTD = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    x_TD = x_WTD.flatten(0, 1)
    for ffn in ffns_of(model):
        routing = ffn.routing(x_TD)
        experts = ffn.experts
        if routing is None:
            assert experts is None
            continue
        assert experts is not None
        shared = ffn.layer().shared()
        found = glu_forward(x_WTD, shared) + experts(x_WTD, *routing.slots())
        torch.testing.assert_close(found, ffn(x_WTD), rtol=1e-5, atol=1e-5)
        assert experts.forward(x_TD, *routing.slots()).shape == x_TD.shape


def test_experts_by_hand_and_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = LayerShape(1, 2, 1, 1, "linear", output_bias=True, expert_bias=True)
    ffn = MoEFeedForward(shape, 2, "relu")
    with torch.no_grad():
        ffn.gate_weight.copy_(torch.tensor([[7.0, 7.0], [1.0, 0.0], [0.0, 1.0]]))
        ffn.up_weight.copy_(torch.tensor([[7.0, 7.0], [1.0, 0.0], [0.0, 1.0]]))
        ffn.down_weight.copy_(torch.tensor([[7.0, 7.0], [1.0, 2.0], [3.0, 4.0]]))
        ffn.expert_bias.copy_(torch.tensor([[10.0, 20.0], [30.0, 40.0]]))  # type: ignore[union-attr]
        ffn.output_bias.fill_(999.0)  # type: ignore[union-attr]
    experts = ffn.experts
    assert experts is not None
    x_TD = torch.tensor([[2.0, 3.0], [1.0, 5.0], [4.0, 1.0]])
    ids_TK = torch.tensor([[0, 1], [1, 2], [2, 2]], dtype=torch.int32)
    factors_TK = torch.tensor([[1.0, 0.5], [2.0, 77.0], [77.0, 77.0]], requires_grad=True)
    for path in ("masked", "grouped"):
        monkeypatch.setattr(ops, "choose_path", lambda *_, path=path: path)
        y_TD = experts(x_TD, ids_TK, factors_TK)
        # x0^2 (1, 2) + (10, 20), x1^2 (3, 4) + (30, 40); an id of 2 is no expert.
        assert y_TD.tolist() == [[14 + 28.5, 28 + 38.0], [210.0, 280.0], [0.0, 0.0]]
        [gradient] = torch.autograd.grad(y_TD.sum(), factors_TK)
        assert gradient.tolist() == [[42.0, 133.0], [490 / 2, 0.0], [0.0, 0.0]]
