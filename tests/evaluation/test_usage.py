"""Expert usage: known counts, and hooks on modules that only look like a MoE layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.results import LayerUsage
from weaver.artifacts.types import ExpertLayout, Router
from weaver.evaluation.usage import count_usage, expert_usage, layer_usage
from weaver.kernels.reference import Routing
from weaver.models.accounting import ModelAccount
from weaver.models.moe import MoEFeedForward

BuildModel = Callable[..., PreTrainedModel]


class FixedRouting(nn.Module):
    """Sends token t to experts t mod E and 0, and passes its input on."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_routed_experts = experts

    def routing(self, x_TD: Tensor) -> Routing:
        assert x_TD.ndim == 2
        ids_T = 1 + torch.arange(x_TD.shape[0]) % (self.num_routed_experts - 1)
        ids_TK = torch.stack([torch.zeros_like(ids_T), ids_T], dim=1)
        return Routing.of_top_k(ids_TK, torch.ones(ids_TK.shape), self.num_routed_experts)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_balance_of_known_counts() -> None:
    usage = layer_usage(torch.tensor([3, 1, 0, 4]), 4, "model.layers.7.mlp")
    assert usage.layer == 7
    assert usage.token_share == (0.75, 0.25, 0.0, 1.0)
    assert usage.experts_per_token == 2.0
    # mean 2, population variance (1 + 1 + 4 + 4) / 4 = 2.5
    assert usage.coefficient_of_variation == pytest.approx(math.sqrt(2.5) / 2)
    assert usage.dead_share == 0.25
    # p = 3/8, 1/8, 1/2: entropy 0.974315 nats
    assert usage.entropy == pytest.approx(0.974315, abs=1e-6)


def test_even_use_has_full_entropy_and_single_use_none() -> None:
    even = layer_usage(torch.full((8,), 5), 20, "layers.0")
    assert even.entropy == pytest.approx(math.log(8))
    assert even.coefficient_of_variation == 0.0
    single = layer_usage(torch.tensor([0, 6]), 6, "layers.0")
    assert single.entropy == 0.0
    assert math.copysign(1.0, single.entropy) == 1.0
    assert single.dead_share == 0.5


def test_a_layer_that_selects_nothing() -> None:
    usage = layer_usage(torch.zeros(3, dtype=torch.int64), 5, "layers.0")
    assert usage.token_share == (0.0, 0.0, 0.0)
    assert (usage.experts_per_token, usage.dead_share) == (0.0, 1.0)
    assert (usage.coefficient_of_variation, usage.entropy) == (0.0, 0.0)


def test_a_threshold_layer_reports_what_it_really_selects() -> None:
    """Two experts of one neuron, set to one a token, of which four tokens select 0, 1, 2 and 0."""
    matrix_FD = torch.eye(2)
    ffn = MoEFeedForward.convert(
        GluWeights(matrix_FD, matrix_FD, matrix_FD, "relu"),
        ExpertLayout(
            2, 1, torch.empty(0, dtype=torch.int64), torch.tensor([[0], [1]]), selection="threshold"
        ),
        Router(
            "linear", matrix_FD, torch.zeros(2), torch.zeros(2), bias_E=torch.tensor([-1.0, -1.0])
        ),
    )
    x_TD = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    with count_usage(nn.Sequential(ffn)) as counts:
        y_TD = ffn(x_TD)
    (usage,) = counts.summary()
    assert usage.token_share == (0.5, 0.25)
    assert usage.experts_per_token == 0.75
    # Where no expert runs and nothing is shared, the output is 0.
    assert y_TD.tolist() == [[0.0, 0.0], [4.0, 0.0], [9.0, 9.0], [0.0, 0.0]]
    # 2 * 2 * (3 * (0 + K * 1) + 2): 20 at K = 1, 17 at the 0.75 that were selected.
    account = ModelAccount(2, 2, 100, [ffn.shape])
    assert account.ffn_flops == 20
    assert account.measured_ffn_flops({usage.layer: usage.experts_per_token}) == 17


def with_routing(model: PreTrainedModel, *experts: int) -> PreTrainedModel:
    for layer, count in zip(model.get_submodule("model.layers").children(), experts, strict=True):
        layer.mlp = FixedRouting(count)
    return model


def test_a_models_layers_are_counted_and_static_ones_left_out(build_llama: BuildModel) -> None:
    model = with_routing(build_llama(num_hidden_layers=3), 3, 0, 5)
    done: list[int] = []
    first, second = expert_usage(model, torch.zeros(2, 4, dtype=torch.int64), on_window=done.append)
    assert (first.layer, second.layer) == (0, 2)
    assert first.module == "model.layers.0.mlp"
    assert first.tokens == 8
    # 4 tokens a window: experts 1, 2, 1, 2 and always 0.
    assert first.token_share == (1.0, 0.5, 0.5)
    assert first.experts_per_token == second.experts_per_token == 2.0
    assert second.token_share == (1.0, 0.25, 0.25, 0.25, 0.25)
    assert second.num_routed_experts == 5
    assert done == [1, 2]


def test_hooks_are_gone_after_the_block_even_after_an_error(build_llama: BuildModel) -> None:
    model = with_routing(build_llama(), 3, 3)

    def fail() -> None:
        with count_usage(model) as counts:
            model(torch.zeros(1, 4, dtype=torch.int64))
            assert [usage.tokens for usage in counts.summary()] == [4, 4]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_nothing_to_count_gives_nothing(build_llama: BuildModel) -> None:
    windows_WT = torch.zeros(1, 4, dtype=torch.int64)
    assert expert_usage(build_llama(), windows_WT) == ()
    with count_usage(with_routing(build_llama(), 3, 3)) as counts:
        pass
    assert counts.summary() == ()


def test_usage_survives_json() -> None:
    usage = layer_usage(torch.tensor([3, 1]), 4, "model.layers.0.mlp")
    assert LayerUsage.model_validate_json(usage.model_dump_json()) == usage
