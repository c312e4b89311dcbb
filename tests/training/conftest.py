"""A tiny Llama whose FFNs are routed: a double with the attributes that training relies on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from weaver.kernels.reference import Routing

HIDDEN, EXPERTS, WIDTH, TOP_K, VOCABULARY = 16, 4, 4, 2, 40

ModelFactory = Callable[..., LlamaForCausalLM]


class RouterDouble(nn.Module):
    balance_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.scale = nn.Parameter(torch.zeros(EXPERTS))
        self.weighting = "unit"
        self.register_buffer("balance_bias", torch.zeros(EXPERTS))


class FeedForwardDouble(nn.Module):
    """Routed experts without a shared one, every expert computed and masked."""

    top_k = TOP_K
    temperature: float | None = None
    gate_weight: nn.Parameter
    up_weight: nn.Parameter
    down_weight: nn.Parameter

    def __init__(self, *, static: bool) -> None:
        super().__init__()
        for name in ("gate_weight", "up_weight", "down_weight"):
            self.register_parameter(
                name, nn.Parameter(torch.randn(EXPERTS * WIDTH, HIDDEN) / HIDDEN**0.5)
            )
        self.router = None if static else RouterDouble()
        self.num_routed_experts = 0 if static else EXPERTS

    def routing(self, x_TD: Tensor) -> Routing:
        assert self.router is not None
        score_TE = self.probabilities(x_TD)
        ids_TK = (score_TE + self.router.balance_bias).topk(TOP_K).indices
        weights_TK = 1 + (score_TE * self.router.scale).gather(-1, ids_TK)
        return Routing.of_top_k(ids_TK, weights_TK, EXPERTS)

    def probabilities(self, x_TD: Tensor) -> Tensor:
        assert self.router is not None
        return functional.linear(x_TD, self.router.weight).softmax(-1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, HIDDEN)
        h_TF = functional.silu(x_TD @ self.gate_weight.T) * (x_TD @ self.up_weight.T)
        if self.router is not None:
            factors_TE = self.routing(x_TD).factors_TE()
            h_TF = h_TF * factors_TE.repeat_interleave(WIDTH, dim=-1)
        return (h_TF @ self.down_weight).view_as(hidden_states)


def build_model(*, static: bool = False, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=EXPERTS * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=dropout,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp = FeedForwardDouble(static=static)
    model.eval()
    return model


@pytest.fixture
def make_model() -> ModelFactory:
    return build_model


@pytest.fixture
def windows_WT() -> Tensor:
    """Six windows of 12 tokens that repeat with period 3, so that there is something to learn."""
    starts_W1 = torch.arange(6).unsqueeze(1)
    return (starts_W1 * 5 + torch.arange(12) % 3) % VOCABULARY
