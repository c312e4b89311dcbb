"""The family table: every row is real and tested, and what is not in it is refused clearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY, TINY_MOE, model_type, tiny_config, tiny_model
from torch.nn import functional
from transformers import Gemma3Config, GPT2Config
from transformers.activations import ACT2FN

from weaver.algorithms.glu import ACTIVATIONS
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.models.families import (
    ACTIVATION_NAMES,
    FAMILIES,
    MOE_FAMILIES,
    activation_name,
    find_family,
)


def test_every_row_has_a_tiny_config() -> None:
    assert {model_type(variant) for variant in TINY} == set(FAMILIES)
    assert list(TINY_MOE) == list(MOE_FAMILIES)


@pytest.mark.parametrize("variant", TINY)
def test_a_row_names_what_transformers_has(variant: str) -> None:
    family = find_family(model_type(variant), model="tiny")
    model = tiny_model(variant)
    assert type(model) is getattr(transformers, family.causal_lm)
    assert model.config.model_type == family.model_type
    ffn = model.get_submodule(f"{family.layers}.0.{family.ffn}")
    projections = {name for name, module in ffn.named_children() if name != "act_fn"}
    activations = {"activation_fn", "act_fn"}
    assert projections - activations == {family.gate, family.up, family.down}
    assert family.converted_model_type == f"weaver_{family.model_type}"


@pytest.mark.parametrize("variant", TINY)
def test_the_activation_field_is_the_one_the_ffn_uses(variant: str) -> None:
    field = FAMILIES[model_type(variant)].activation_field
    changes: dict[str, Any] = {field: "relu"}
    model = tiny_model(variant, **changes)
    ffn = model.get_submodule("model.layers.0.mlp")
    activation: Any = getattr(ffn, "activation_fn" if hasattr(ffn, "activation_fn") else "act_fn")
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation(x), functional.relu(x))


@pytest.mark.parametrize("hf_name", ACTIVATION_NAMES)
def test_activations_are_the_functions_of_transformers(hf_name: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    ours = ACTIVATIONS[activation_name(hf_name, model="tiny")](x)
    torch.testing.assert_close(ours, ACT2FN[hf_name](x), rtol=1e-12, atol=1e-12)


def test_exact_and_approximate_gelu_are_told_apart() -> None:
    assert activation_name("gelu", model="tiny") != activation_name("gelu_new", model="tiny")
    # gelu(1) = Phi(1) = 0.841345; 0.5 (1 + tanh(sqrt(2 / pi) * 1.044715)) = 0.841192.
    one = torch.ones(())
    assert float(ACTIVATIONS["gelu"](one)) == pytest.approx(0.841345, abs=1e-6)
    assert float(ACTIVATIONS["gelu_tanh"](one)) == pytest.approx(0.841192, abs=1e-6)


def test_the_legacy_activation_of_gemma_is_the_tanh_approximation() -> None:
    config = tiny_config("gemma", hidden_act="gelu")
    assert activation_name(config.hidden_act, model="tiny") == "gelu_tanh"


def test_an_unknown_activation() -> None:
    with pytest.raises(WeaverError, match="tiny: activation 'mish' is not known") as caught:
        activation_name("mish", model="tiny")
    assert "gelu_pytorch_tanh" in caught.value.why


def open_config(folder: Path, config: dict[str, object]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(ModelConfig(path=str(folder)))


def test_a_model_without_a_glu(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="model_type 'gpt2' is not in the family table") as caught:
        open_config(tmp_path, GPT2Config().to_dict())
    assert "llama, mistral, qwen2" in caught.value.why
    assert "weaver/models/families.py" in caught.value.fix


def test_a_multimodal_model(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="model_type 'gemma3' is not in the family table"):
        open_config(tmp_path, Gemma3Config().to_dict())


def test_a_type_that_transformers_does_not_know_either(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="model_type 'llama9' is not in the family table"):
        open_config(tmp_path, {"model_type": "llama9"})


def test_a_model_of_two_levels(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="'weaver_mixtral' has experts that are split already"):
        open_config(tmp_path, {"model_type": "weaver_mixtral"})


def test_a_converted_model_that_was_converted_again(tmp_path: Path) -> None:
    layers: list[dict[str, object]] = [{"experts": [], "shared": None, "outer": None}]
    with pytest.raises(WeaverError, match="has experts that are split already"):
        open_config(tmp_path, {"model_type": "weaver_llama", "weaver": {"layers": layers}})
