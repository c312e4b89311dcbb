"""Converted models as transformers' models: the identity test of every family, and what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_models import masked_model
from tiny_conversions import (
    Conversion,
    OpenTiny,
    ffns_of,
    load_converted,
    random_conversions,
    random_layout,
    random_router,
    write_converted,
)
from tiny_models import PAD_ID, TINY, model_type, random_ids, tiny_config, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from weaver.algorithms.glu import glu_forward
from weaver.artifacts.types import RouterKind
from weaver.kernels import ops
from weaver.models.accounting import LayerShape
from weaver.models.checkpoint import Checkpoint
from weaver.models.families import FAMILIES
from weaver.models.hf import converted_config, register


def logits(model: Any, ids_WT: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids_WT, **arguments).logits
    return found


def generate(model: Any, ids_WT: Tensor, count: int, **options: Any) -> Any:
    """Greedy continuation by a stated number of tokens."""
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    return model.generate(ids_WT, **lengths, do_sample=False, **options)


def converted(
    open_tiny: OpenTiny, variant: str, folder: Path, **options: Any
) -> tuple[Checkpoint, list[Conversion], PreTrainedModel]:
    checkpoint = open_tiny(variant)
    conversions = random_conversions(checkpoint, **options)
    return checkpoint, conversions, load_converted(write_converted(checkpoint, folder, conversions))


@pytest.mark.parametrize("variant", TINY)
def test_identity(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    """All experts active equals the dense model, by every step that ``assemble`` takes."""
    _, _, model = converted(
        open_tiny, variant, tmp_path / "moe", shared=8, experts=5, top_k=5, kind="linear"
    )
    assert model.config.model_type == f"weaver_{model_type(variant)}"
    assert len(ffns_of(model)) == 3
    ids_WT = random_ids(2, 24)
    torch.testing.assert_close(
        logits(model, ids_WT), logits(tiny_model(variant), ids_WT), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("variant", TINY)
def test_a_part_of_the_experts_is_the_masked_dense_model(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    checkpoint, conversions, model = converted(
        open_tiny, variant, tmp_path / "moe", shared=8, experts=5, top_k=2, scale=0.5
    )
    ids_WT = random_ids(2, 24)
    expected = logits(masked_model(variant, checkpoint, conversions), ids_WT)
    torch.testing.assert_close(logits(model, ids_WT), expected, rtol=1e-4, atol=1e-4)
    dense = logits(tiny_model(variant), ids_WT)
    assert (expected - dense).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["linear", "glu"])
@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_both_routers_on_both_paths(
    open_tiny: OpenTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: RouterKind,
    path: str,
) -> None:
    checkpoint, conversions, model = converted(
        open_tiny, "llama+bias", tmp_path / "moe", shared=0, experts=6, top_k=2, kind=kind, scale=1
    )
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    ids_WT = random_ids(2, 24)
    expected = logits(masked_model("llama+bias", checkpoint, conversions), ids_WT)
    torch.testing.assert_close(logits(model, ids_WT), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_leave_neurons_out(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint, conversions, model = converted(
        open_tiny, "qwen3", tmp_path / "moe", shared=10, experts=3, top_k=1, width=7
    )
    ids_WT = random_ids(1, 24)
    expected = logits(masked_model("qwen3", checkpoint, conversions), ids_WT)
    torch.testing.assert_close(logits(model, ids_WT), expected, rtol=1e-4, atol=1e-4)
    assert {ffn.gate_weight.shape for ffn in ffns_of(model)} == {(31, 32)}


@pytest.mark.parametrize("variant", ["llama", "llama+bias"])
def test_a_static_layout_with_a_bias(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    """Check that a static layout's output bias is added, on top of the FFN's own if it has one."""
    checkpoint = open_tiny(variant)
    bias_D = torch.linspace(-1, 1, 32)
    layout = random_layout(48, shared=30, experts=0, top_k=0, output_bias_D=bias_D)
    conversions: list[Conversion] = [(layout, None)] * 3
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", conversions))
    ids_WT = random_ids(2, 16)
    expected = logits(masked_model(variant, checkpoint, conversions), ids_WT)
    torch.testing.assert_close(logits(model, ids_WT), expected, rtol=1e-4, atol=1e-4)
    without = glu_forward(
        torch.ones(1, 32), checkpoint.ffn(0, torch.float32).select(layout.shared_S)
    )
    with torch.no_grad():
        torch.testing.assert_close(ffns_of(model)[0](torch.ones(1, 32)), without + bias_D)


def test_every_layer_has_its_own_shape(open_tiny: OpenTiny, tmp_path: Path) -> None:
    checkpoint = open_tiny("mistral")
    conversions: list[Conversion] = [
        (random_layout(48, shared=8, experts=5, top_k=2), random_router("linear", 5, 32)),
        (random_layout(48, shared=24, experts=0, top_k=0), None),
        (random_layout(48, shared=0, experts=4, top_k=1), random_router("glu", 4, 32)),
    ]
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", conversions))
    ids_WT = random_ids(2, 16)
    expected = logits(masked_model("mistral", checkpoint, conversions), ids_WT)
    torch.testing.assert_close(logits(model, ids_WT), expected, rtol=1e-4, atol=1e-4)
    assert [ffn.top_k for ffn in ffns_of(model)] == [2, 0, 1]
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    entries = config["weaver"]["layers"]
    assert [entry["n_routed_experts"] for entry in entries] == [5, 0, 4]
    assert [entry["router_kind"] for entry in entries] == ["linear", None, "glu"]
    assert entries[0] == {
        "num_shared_neurons": 8,
        "n_routed_experts": 5,
        "moe_intermediate_size": 8,
        "num_experts_per_tok": 2,
        "router_kind": "linear",
        "gate_bias": False,
        "up_bias": False,
        "output_bias": False,
        "router_bias": False,
        "expert_bias": False,
        "selection": "top-k",
        "weighting": "unit",
        "routed_scaling": 1.0,
        "threshold_slope": 0.0,
        "early_experts": 0.0,
        "late_experts": 0.0,
    }


@pytest.mark.parametrize("variant", TINY)
def test_a_cache_changes_nothing(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    """Twelve tokens in all, past the sliding window of eight."""
    _, _, model = converted(open_tiny, variant, tmp_path / "moe", shared=8, experts=5, top_k=2)
    found = [
        generate(
            model,
            random_ids(2, 7),
            5,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert found[0].sequences.shape == (2, 12)
    torch.testing.assert_close(
        torch.stack(found[0].logits), torch.stack(found[1].logits), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("variant", TINY)
def test_left_padding_changes_nothing(open_tiny: OpenTiny, tmp_path: Path, variant: str) -> None:
    _, _, model = converted(open_tiny, variant, tmp_path / "moe", shared=8, experts=5, top_k=2)
    long, short = random_ids(1, 12), random_ids(1, 5, seed=1)
    padded = torch.cat([torch.full((1, 7), PAD_ID), short], dim=1)
    ids_WT = torch.cat([long, padded])
    mask_WT = torch.ones_like(ids_WT)
    mask_WT[1, :7] = 0
    together = generate(model, ids_WT, 3, attention_mask=mask_WT)
    assert torch.equal(together[0, 12:], generate(model, long, 3)[0, 12:])
    assert torch.equal(together[1, 12:], generate(model, short, 3)[0, 5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(
    open_tiny: OpenTiny, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = open_tiny("llama+bias", dtype=dtype)
    conversions = random_conversions(
        checkpoint, shared=8, experts=5, top_k=2, kind="glu", scale=0.25
    )
    folder = write_converted(checkpoint, tmp_path / "moe", conversions, dtype=dtype)
    model = load_converted(folder)
    assert model.dtype == dtype
    router = conversions[1][1]
    assert router is not None
    layer = ffns_of(model)[1].router
    assert layer is not None
    assert torch.equal(layer.balance_bias, router.balance_bias_E.to(dtype))
    assert torch.equal(layer.scale, router.scale_E.to(dtype))
    model.save_pretrained(tmp_path / "again")
    again = load_converted(tmp_path / "again")
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.config.weaver == model.config.weaver
    assert again.config.weaver["recipe"] == {"seed": 0}
    assert type(again) is type(model)


def test_a_dense_class_that_code_marked_as_its_own_takes_no_code_along(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does with the classes that a trusted folder's code names."""
    _, _, model = converted(open_tiny, "llama", tmp_path / "moe", shared=8, experts=5, top_k=2)
    monkeypatch.setattr(LlamaConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(LlamaForCausalLM, "_auto_class", "AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_gradients_reach_weights_and_router_scale(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    _, _, model = converted(
        open_tiny, "llama", tmp_path / "moe", shared=8, experts=5, top_k=2, scale=0.1
    )
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    model.train()
    ids_WT = random_ids(4, 24)
    model(ids_WT, labels=ids_WT).loss.backward()
    for ffn in ffns_of(model):
        assert ffn.router is not None
        parameters = dict(ffn.named_parameters())
        assert set(parameters) == {
            "gate_weight", "up_weight", "down_weight", "router.weight", "router.scale"
        }  # fmt: skip
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_an_untrained_router_scale_still_learns(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """At scale 0 the outputs have weight 1 and the scale a gradient, the router matrix none."""
    _, _, model = converted(open_tiny, "llama", tmp_path / "moe", shared=8, experts=5, top_k=2)
    ids_WT = random_ids(4, 24)
    model(ids_WT, labels=ids_WT).loss.backward()
    router = ffns_of(model)[0].router
    assert router is not None
    assert router.scale.grad is not None
    assert router.weight.grad is not None
    assert router.scale.grad.abs().max() > 0
    assert router.weight.grad.abs().max() == 0


@pytest.mark.parametrize("variant", TINY)
def test_a_model_from_its_configuration_alone(variant: str) -> None:
    register()
    shape = LayerShape(8, 5, 8, 2, "glu", gate_bias=True, up_bias=True, output_bias=True)
    config = converted_config(tiny_config(variant), [shape] * 3, {})
    model = AutoModelForCausalLM.from_config(config)
    assert logits(model, random_ids(2, 16)).isfinite().all()
    ffn = ffns_of(model)[2]
    assert ffn.gate_weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert ffn.output_bias is not None
    assert ffn.output_bias.abs().max() == 0
    assert ffn.router is not None
    assert ffn.router.scale.abs().max() == 0


def test_the_configuration_keeps_what_the_dense_one_says() -> None:
    dense = tiny_config("gemma3_text", rope_theta=12345.0)
    config = converted_config(dense, [LayerShape(24)] * 3, {"seed": 7})
    changed = {"model_type", "architectures", "transformers_version", "weaver"}
    before, after = dense.to_dict(), config.to_dict()
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    assert config.architectures == ["WeaverGemma3ForCausalLM"]
    assert config.weaver["recipe"] == {"seed": 7}


def test_a_configuration_with_another_number_of_layers() -> None:
    config = converted_config(tiny_config("llama"), [LayerShape(24)] * 2, {})
    with pytest.raises(ValueError, match="shorter"):
        AutoModelForCausalLM.from_config(config)


def test_registering_is_enough(open_tiny: OpenTiny, tmp_path: Path) -> None:
    """A fresh process that knows nothing but ``weaver.register`` loads and runs a model."""
    converted(open_tiny, "phi3", tmp_path / "moe", shared=8, experts=5, top_k=5)
    script = (
        "import torch, weaver; weaver.register()\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "AutoConfig.for_model('weaver_gemma2')\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'moe')!r})\n"
        "with torch.no_grad():\n"
        "    print(type(model).__name__, model(torch.arange(5)[None]).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    name, total = done.stdout.split()
    assert name == "WeaverPhi3ForCausalLM"
    expected = logits(tiny_model("phi3"), torch.arange(5)[None]).double().sum().item()
    assert float(total) == pytest.approx(expected, abs=1e-3)


def test_registering_twice_is_harmless() -> None:
    register()
    register()
    for family in FAMILIES.values():
        config = AutoConfig.for_model(family.converted_model_type)
        assert config.model_type == family.converted_model_type
