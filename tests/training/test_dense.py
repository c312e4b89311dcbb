"""Routers trained on all experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_conversions import load_converted, random_conversions, write_converted
from tiny_models import random_ids
from torch import Tensor
from transformers import PreTrainedModel

from weaver.config.finetuning import FinetuneConfig
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.kernels.reference import MoELayer, masked_forward, route_to_all
from weaver.models.checkpoint import Checkpoint
from weaver.models.moe import MoEFeedForward
from weaver.training.balance import routed_layers
from weaver.training.dense import require_softmax_weights, routed_to_all
from weaver.training.loop import finetune
from weaver.training.trainer import StepReport


def converted(tiny_llama: Path, folder: Path, *, softmax: bool) -> PreTrainedModel:
    checkpoint = Checkpoint(ModelConfig(path=str(tiny_llama)))
    conversions = random_conversions(checkpoint, shared=8, experts=5, top_k=2)
    if softmax:
        conversions = [
            (
                replace(layout, weighting="softmax", routed_scaling=2.0),
                router and replace(router, weighting="softmax", routed_scaling=2.0),
            )
            for layout, router in conversions
        ]
    return load_converted(write_converted(checkpoint, folder, conversions))


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> PreTrainedModel:
    return converted(tiny_llama, tmp_path / "moe", softmax=True)


def first_layer(model: PreTrainedModel) -> MoEFeedForward:
    layer = next(iter(routed_layers(model).values()))
    assert isinstance(layer, MoEFeedForward)
    return layer


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_every_expert_has_its_share(model: PreTrainedModel, temperature: float) -> None:
    layer = first_layer(model)
    x_TD = torch.randn(7, layer.gate_weight.shape[1], generator=torch.Generator().manual_seed(0))
    router = layer.router
    assert router is not None
    routing = route_to_all(x_TD, router.record(), layer.activation, temperature)
    scores_TE = x_TD @ router.weight.T
    assert router.bias is None
    expected_TE = 2.0 * (scores_TE / temperature).softmax(-1)
    torch.testing.assert_close(routing.factors_TE(), expected_TE)
    with routed_to_all(model, temperature):
        found_TD = layer(x_TD)
    weights, shared = layer.weights(), layer.shape.num_shared_neurons
    torch.testing.assert_close(found_TD, masked_forward(x_TD, MoELayer(weights, shared), routing))
    assert not torch.equal(layer(x_TD), found_TD)


def test_routing_is_sparse_again_after_an_error(model: PreTrainedModel) -> None:
    def fail() -> None:
        with routed_to_all(model, 1.0):
            assert first_layer(model).temperature == 1.0
            raise KeyError

    with pytest.raises(KeyError, match=r"^$"):
        fail()
    assert first_layer(model).temperature is None
    with routed_to_all(model, None):
        assert first_layer(model).temperature is None


def test_router_training_moves_the_routers_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"temperature": 1.0, "trainable": "router", "steps": 12, "learning_rate": 1e-2}
    settings |= {"objective": "next-token", "balance_update": 0, "warmup_steps": 0}
    config = FinetuneConfig.model_validate(settings)
    losses = []

    def on_step(report: StepReport) -> None:
        losses.append(report.loss)

    windows_WT: Tensor = random_ids(4, 16)
    finetune(
        model, [windows_WT], config, seed=0, checkpoint_dir=tmp_path / "train", on_step=on_step
    )
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"{name}.router.weight" for name in routed_layers(model)}


def test_summands_cannot_be_averaged(tiny_llama: Path, tmp_path: Path) -> None:
    model = converted(tiny_llama, tmp_path / "moe", softmax=False)
    config = FinetuneConfig(objective="next-token", temperature=1.0, trainable="router", steps=1)
    with pytest.raises(WeaverError, match="temperature needs experts with softmax weights"):
        finetune(model, [random_ids(4, 16)], config, seed=0, checkpoint_dir=tmp_path)
    with pytest.raises(WeaverError, match=r"model\.layers\.0\.mlp") as error:
        require_softmax_weights(model)
    assert "partition.weighting=softmax" in error.value.fix
