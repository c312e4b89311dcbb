"""Models that are Mixtures of Experts already: every expert is split again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversions import (
    OpenTiny,
    ffns_of,
    load_converted,
    random_conversions,
    write_converted,
)
from tiny_models import TINY_MOE, random_ids, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.algorithms.glu import glu_forward
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.kernels.reference import Routing
from weaver.models.checkpoint import Checkpoint
from weaver.models.sites import Site
from weaver.models.stream import DecoderStream, DenseFfn, layer_ffns, routing_tap
from weaver.models.two_level import ExpertList

IDS_WT = random_ids(2, 24)
ALL: dict[str, Any] = {"shared": 4, "experts": 4, "top_k": 4}
# Sites of the tiny models: sizes of their FFNs, in order.
SIZES = {
    "qwen2_moe": [24, 24, 24, 24, 40] * 2,
    "qwen3_moe": [48, 24, 24, 24, 24],
    "mixtral": [24] * 8,
    "olmoe": [24] * 8,
    "glm4_moe": [48, 24, 24, 24, 24, 48],
}


def logits(model: Any, ids_WT: Tensor = IDS_WT) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids_WT).logits
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def converted(
    checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    conversions = random_conversions(checkpoint, **(ALL | options))
    return load_converted(write_converted(checkpoint, folder, conversions, dtype=dtype))


def split_once(
    open_tiny: OpenTiny, folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> tuple[Checkpoint, PreTrainedModel]:
    """A checkpoint that weaver made, and its model."""
    model = converted(open_tiny("llama+bias"), folder, **options)
    tokenizer.save_pretrained(folder)
    return Checkpoint(ModelConfig(path=str(folder))), model


@pytest.mark.parametrize("variant", TINY_MOE)
def test_identity(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    """All sub-experts active equals the MoE model, by every step that ``assemble`` takes."""
    checkpoint = open_tiny(variant)
    model = converted(checkpoint, tmp_path / "moe")
    assert model.config.model_type == f"weaver_{variant}"
    assert [ffn.shape.total_neurons for ffn in ffns_of(model)] == SIZES[variant]
    assert_same(logits(model), logits(tiny_model(variant)))


@pytest.mark.parametrize("variant", TINY_MOE)
def test_fewer_sub_experts_are_not_the_moe_model(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    model = converted(open_tiny(variant), tmp_path / "moe", top_k=2)
    difference = logits(model) - logits(tiny_model(variant))
    assert float(difference.abs().max()) > 1e-2


@pytest.mark.parametrize("variant", TINY_MOE)
def test_saved_again_it_is_the_same_model(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    model = converted(open_tiny(variant), tmp_path / "moe", top_k=2)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_converted(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("variant", TINY_MOE)
def test_sites_are_read_in_the_order_of_the_modules(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    checkpoint = open_tiny(variant)
    model = converted(checkpoint, tmp_path / "moe")
    x_TD = torch.randn(5, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    assert [checkpoint.neurons(site) for site in range(checkpoint.num_sites)] == SIZES[variant]
    for site, ffn in enumerate(ffns_of(model)):
        with torch.no_grad():
            assert_same(ffn(x_TD), glu_forward(x_TD, checkpoint.ffn(site, torch.float32)))


@pytest.mark.parametrize("variant", TINY_MOE)
def test_the_stream_is_the_whole_model(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    checkpoint = open_tiny(variant)
    stream = DecoderStream(checkpoint, torch.float32, IDS_WT)
    hidden_WTD = stream.embed(tmp_path)

    def dense(site: Site) -> nn.Module:
        return DenseFfn(checkpoint.ffn(site.number, torch.float32))

    for layer in range(checkpoint.num_layers):
        stream.run(layer, layer_ffns(checkpoint, layer, dense), hidden_WTD, write=True)
    model = tiny_model(variant)
    with torch.no_grad():
        found = model.lm_head(model.model.norm(hidden_WTD))
    assert_same(found, logits(model))


def test_a_tap_is_shown_what_the_experts_are_shown(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint = open_tiny("qwen2_moe")
    stream = DecoderStream(checkpoint, torch.float32, IDS_WT)
    hidden_WTD = stream.embed(tmp_path)
    seen: list[tuple[Tensor, Routing]] = []

    def note(x_TD: Tensor, routing: Routing) -> None:
        seen.append((x_TD.clone(), routing))

    def dense(site: Site) -> nn.Module:
        return DenseFfn(checkpoint.ffn(site.number, torch.float32))

    stream.run(0, routing_tap(checkpoint, 0, note), hidden_WTD, write=False)
    stream.run(0, layer_ffns(checkpoint, 0, dense, note), hidden_WTD, write=True)
    (tapped_TD, tapped), (shown_TD, shown) = seen
    assert torch.equal(tapped_TD, shown_TD)
    assert torch.equal(tapped.selected_TE(), shown.selected_TE())
    assert tapped.counts_E().sum() == 2 * IDS_WT.numel()


def test_the_sum_of_experts_by_hand() -> None:
    """Token 0 uses experts 0 and 2, token 1 none but 1; the id 3 stands for no expert."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x_TD: Tensor) -> Tensor:
            return self.factor * x_TD

    experts = ExpertList([Times(1.0), Times(10.0), Times(100.0)])
    found = experts(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[2, 0], [1, 3]]),
        torch.tensor([[0.5, 2.0], [0.1, 7.0]]),
    )
    assert_same(found, torch.tensor([[52.0, 104.0], [3.0, 4.0]]))


def test_what_the_router_adds_stays_in_float32(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """A correction bias in bfloat16 would change which experts GLM selects."""
    model = converted(open_tiny("glm4_moe"), tmp_path / "moe", dtype=torch.bfloat16)
    block: Any = model.get_submodule("model.layers.1.mlp")
    expected: Any = tiny_model("glm4_moe").get_submodule("model.layers.1.mlp")
    assert block.gate.weight.dtype == torch.bfloat16
    assert torch.equal(block.gate.e_score_correction_bias, expected.gate.e_score_correction_bias)


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 2, "scale": 0.5}, {"kind": "glu", "top_k": 1}, {"shared": 0, "experts": 6}],
    ids=["all", "some", "glu", "no shared"],
)
def test_a_model_that_weaver_made_is_split_again(
    open_tiny: OpenTiny, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, options: Any
) -> None:
    """All sub-experts active equals the converted model: its router and factors stay."""
    options = {"shared": 8, "experts": 5, "top_k": 5, **options}
    checkpoint, once = split_once(open_tiny, tmp_path / "once", tiny_tokenizer, **options)
    twice = converted(checkpoint, tmp_path / "twice", shared=4, experts=4, top_k=4)
    assert twice.config.model_type == "weaver_llama"
    per_layer = options["experts"] + (options["shared"] > 0)
    assert len(ffns_of(twice)) == 3 * per_layer
    assert_same(logits(twice), logits(once))
    twice.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_converted(tmp_path / "again")), logits(twice))


def test_an_expert_that_the_checkpoint_lacks(open_tiny: OpenTiny) -> None:
    """The last expert of a layer: by the names alone the layer would have three."""
    path = open_tiny("olmoe").folder / "model.safetensors"
    tensors = load_file(path)
    lost = [name for name in tensors if ".1.mlp.experts.3." in name]
    assert len(lost) == 3
    save_file({k: v for k, v in tensors.items() if k not in lost}, path, {"format": "pt"})
    with pytest.raises(
        WeaverError, match=r"'model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight'"
    ):
        Checkpoint(ModelConfig(path=str(path.parent)))


def test_heads_that_predict_further_tokens_are_left_out(open_tiny: OpenTiny) -> None:
    checkpoint = open_tiny("glm4_moe")
    path, parameters = checkpoint.folder / "model.safetensors", checkpoint.total_parameters()
    extra = {"model.layers.2.mlp.gate.weight": torch.ones(4, 32)}
    save_file(load_file(path) | extra, path, {"format": "pt"})
    with pytest.raises(WeaverError, match=r"weights of 3 layers, config\.json says 2"):
        Checkpoint(checkpoint.model)
    config = checkpoint.folder / "config.json"
    values = json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}
    config.write_text(json.dumps(values))
    reopened = Checkpoint(checkpoint.model)
    assert (
        reopened.total_parameters()
        == parameters
        == sum(p.numel() for p in tiny_model("glm4_moe").parameters())
    )
    assert not any(name.startswith("model.layers.2.") for name in reopened.names())
