"""Adapters: nothing changes at the start, only thin matrices are trained, merging is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from weaver.config.finetuning import AdapterConfig, PhaseConfig
from weaver.errors import WeaverError
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward
from weaver.training.adapters import LowRank, adapted_names, attach_adapters
from weaver.training.balance import routed_layers
from weaver.training.optimizer import ADAPTER_MARK, select_trainable

ModelFactory = Callable[..., LlamaForCausalLM]
CONFIG = AdapterConfig(rank=2, alpha=8.0)


def spoil(model: nn.Module) -> None:
    """Give every adapter a random second half, so that it does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ADAPTER_MARK in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_low_rank_by_hand(inputs_first: bool) -> None:
    # A = (1 2 3), B = (10 20)^T, alpha / r = 0.5: the update is 0.5 * (10 20 30; 20 40 60).
    shape = (3, 2) if inputs_first else (2, 3)
    config = AdapterConfig(rank=1, alpha=0.5)
    low_rank = LowRank(torch.ones(shape), config, inputs_first=inputs_first)
    assert torch.equal(low_rank(torch.ones(shape)), torch.ones(shape))
    with torch.no_grad():
        low_rank.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        low_rank.lora_B.copy_(torch.tensor([[10.0], [20.0]]))
    expected = 1 + torch.tensor([[5.0, 10.0, 15.0], [10.0, 20.0, 30.0]])
    assert torch.equal(low_rank(torch.ones(shape)), expected.T if inputs_first else expected)


def test_dropout_drops_inputs_and_keeps_the_mean() -> None:
    config = AdapterConfig(rank=2, alpha=2.0, dropout=0.25)
    low_rank = LowRank(torch.zeros(5, 4000), config, inputs_first=False)
    spoil_weight = torch.ones(2, 4000), torch.ones(5, 2)
    with torch.no_grad():
        low_rank.lora_A.copy_(spoil_weight[0])
        low_rank.lora_B.copy_(spoil_weight[1])
    torch.manual_seed(0)
    delta = low_rank.train()(torch.zeros(5, 4000))
    # Column i is 0 or 2 / (1 - 0.25), the same in every row.
    assert torch.equal(delta, delta[:1].expand_as(delta))
    assert delta.unique().tolist() == pytest.approx([0.0, 2 / 0.75])
    assert delta.mean().item() == pytest.approx(2.0, rel=0.05)
    assert torch.equal(low_rank.eval()(torch.zeros(5, 4000)), torch.full((5, 4000), 2.0))


@pytest.mark.parametrize("targets", [("attention",), ("ffn",), ("attention", "ffn")])
def test_attached_trained_and_merged(
    make_model: ModelFactory, windows_WT: Tensor, targets: tuple[str, ...]
) -> None:
    config = CONFIG.model_copy(update={"targets": targets})
    model, before = make_model(), make_model()
    names, logits = adapted_names(model, config), before(windows_WT).logits
    adapters = attach_adapters(model, config, seed=1)
    assert torch.equal(model(windows_WT).logits, logits)
    assert routed_layers(model).keys() == routed_layers(before).keys()

    spoil(model)
    changed = model(windows_WT).logits.detach()
    merged = {name: adapters.merged(name).clone() for name in names}
    norm = adapters.merged("model.norm.weight")
    adapters.merge()

    state = model.state_dict()
    assert state.keys() == before.state_dict().keys()
    assert not torch.allclose(changed, logits, atol=1e-2)
    torch.testing.assert_close(model(windows_WT).logits, changed)
    assert torch.equal(norm, state["model.norm.weight"])
    differing = {n for n, v in before.state_dict().items() if not torch.equal(v, state[n])}
    assert differing == set(names)
    for name, value in merged.items():
        assert torch.equal(value, state[name]), name
        rank = torch.linalg.matrix_rank(state[name] - before.state_dict()[name], rtol=1e-3)
        assert int(rank) == 2


def test_only_thin_matrices_and_router_scales_are_trained(make_model: ModelFactory) -> None:
    model = make_model()
    phase = PhaseConfig(trainable="lora", lora=CONFIG)
    attach_adapters(model, CONFIG, seed=0)
    parameters = select_trainable(model, phase)
    # Per layer 4 projections and 3 matrices with two halves each, and the router's scale.
    assert len(parameters) == 2 * (2 * 7 + 1)
    assert all(2 in p.shape for n, p in parameters.items() if not n.endswith("router.scale"))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert "model.layers.0.mlp.parametrizations.gate_weight.original" in frozen
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in frozen


def test_the_seed_decides(make_model: ModelFactory) -> None:
    halves = []
    for seed in (1, 1, 2):
        model = make_model()
        torch.manual_seed(99)
        attach_adapters(model, CONFIG, seed=seed)
        assert torch.initial_seed() == 99
        halves.append({n: p for n, p in model.named_parameters() if "lora_A" in n})
    first, same, other = halves
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())


def test_a_converted_layer_trains_every_expert_through_its_adapters() -> None:
    torch.manual_seed(0)
    shape = LayerShape(4, 3, 4, 2, "linear")
    model = nn.ModuleDict({"ffn": MoEFeedForward(shape, 8, "silu")})
    attach_adapters(model, AdapterConfig(rank=2, targets=("ffn",)), seed=0)
    select_trainable(model, PhaseConfig(trainable="lora", lora=CONFIG))
    model["ffn"](torch.randn(20, 8)).square().sum().backward()
    for name in ("gate", "up", "down"):
        gradient = model.get_parameter(f"ffn.parametrizations.{name}_weight.0.lora_B").grad
        assert gradient is not None
        assert bool(gradient.abs().sum(1).gt(0).all())


def test_no_target(make_model: ModelFactory) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(WeaverError, match=r"0 weights that lora\.targets=\['attention', 'ffn'\]"):
        adapted_names(model, CONFIG)
