"""Choice of trained parameters, optimizer groups, and learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from transformers import LlamaForCausalLM

from weaver.config.finetuning import AdapterConfig, PhaseConfig
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward
from weaver.training.optimizer import (
    build_optimizer,
    learning_rate_factor,
    select_trainable,
    trained_names,
)

ModelFactory = Callable[..., LlamaForCausalLM]
PHASE = PhaseConfig(learning_rate=1e-2, weight_decay=0.1)
ROUTERS = PhaseConfig(trainable="router")


def test_learning_rate_by_hand() -> None:
    # 2 steps of warm-up, then a cosine over 4 steps: 0, 1/3, 2/3 and all of the way.
    factors = [learning_rate_factor(step, 6, 2) for step in range(6)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.775, 0.325, 0.1])
    assert learning_rate_factor(0, 1, 0) == 1.0
    assert [learning_rate_factor(s, 2, 4) for s in range(2)] == [0.25, 0.5]


def test_parameter_groups(make_model: ModelFactory) -> None:
    parameters = select_trainable(make_model(), PHASE)
    scales, matrices, vectors = build_optimizer(parameters, PHASE).param_groups
    assert (scales["lr"], scales["weight_decay"], len(scales["params"])) == (1e-3, 0.0, 2)
    assert (matrices["lr"], matrices["weight_decay"]) == (1e-2, 0.1)
    assert (vectors["lr"], vectors["weight_decay"], len(vectors["params"])) == (1e-2, 0.0, 5)
    assert all(p.ndim == 2 for p in matrices["params"])
    assert matrices["betas"] == (0.9, 0.95)
    assert sum(len(g["params"]) for g in (scales, matrices, vectors)) == len(parameters)


def test_the_intercept_and_the_constants_of_a_converted_layer() -> None:
    shape = LayerShape(2, 3, 4, 1, "linear", router_bias=True, expert_bias=True)
    model = nn.ModuleDict({"ffn": MoEFeedForward(shape, 8, "silu")})
    routers = select_trainable(model, ROUTERS)
    assert set(routers) == {"ffn.router.weight", "ffn.router.scale", "ffn.router.bias"}
    parameters = select_trainable(model, PHASE)
    _, matrices, vectors = build_optimizer(parameters, PHASE).param_groups
    undecayed = {id(p) for p in vectors["params"]}
    names = {name for name, parameter in parameters.items() if id(parameter) in undecayed}
    assert names == {"ffn.router.bias", "ffn.expert_bias"}
    assert len(matrices["params"]) == 4


def test_a_constant_rate_has_a_warm_up_too() -> None:
    factors = [learning_rate_factor(step, 6, 2, "constant") for step in range(6)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_what_goes_with_adapters(make_model: ModelFactory) -> None:
    def names(*also: str) -> set[str]:
        phase = PhaseConfig(trainable="lora", lora=AdapterConfig.model_validate({"also": also}))
        return {name.removeprefix("model.") for name in trained_names(make_model(), phase)}

    scales = {f"layers.{n}.mlp.router.scale" for n in (0, 1)}
    weights = {f"layers.{n}.mlp.router.weight" for n in (0, 1)}
    norms = {
        f"layers.{n}.{name}_layernorm.weight"
        for n in (0, 1)
        for name in ("input", "post_attention")
    }
    assert names() == set()
    assert names("router-scale") == scales
    assert names("router", "norms") == scales | weights | norms | {"norm.weight"}
