"""Speed rows with a clock that the test moves: values by hand, equal work, cache use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_clock import Clock
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from weaver.evaluation.speed import (
    device_header,
    measure_decode,
    measure_prefill,
)
from weaver.kernels import timing
from weaver.kernels.machine import cpu_name


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    value = Clock()
    monkeypatch.setattr(timing, "perf_counter", value)
    return value


class FakeModel(nn.Module):
    """Costs 1 ms per token fed; proposes token 10 * length of the cache; records what it got."""

    def __init__(self, clock: Clock, cost: float = 1e-3) -> None:
        super().__init__()
        self.clock, self.cost = clock, cost
        self.fed: list[list[int]] = []
        self.cached: list[int] = []

    def forward(
        self, input_ids: Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int
    ) -> Any:
        assert use_cache
        assert logits_to_keep == 1
        before = past_key_values or 0
        self.fed.append(input_ids[0].tolist())
        self.cached.append(before)
        self.clock.sleep(self.cost * input_ids.shape[1])
        length = before + input_ids.shape[1]
        logits_11V = torch.zeros(1, 1, 100)
        logits_11V[0, 0, 10 * length] = 1.0
        return SimpleNamespace(logits=logits_11V, past_key_values=length)


def test_prefill_row_by_hand(clock: Clock) -> None:
    models = {"dense": FakeModel(clock, 3e-3), "moe": FakeModel(clock, 2e-3)}
    row = measure_prefill(models, torch.tensor([[7, 8, 9]]), bound=2.0, repeats=3, warmup=1)
    assert (row.phase, row.tokens, row.bound) == ("prefill", 3, 2.0)
    assert (row.dense_ms, row.moe_ms) == pytest.approx((9.0, 6.0))
    assert (row.speedup, row.bound_share) == pytest.approx((1.5, 0.75))
    assert row.dense_tokens_per_second == pytest.approx(1000 / 3)
    assert row.moe_tokens_per_second == pytest.approx(500)
    for model in models.values():
        assert model.fed == [[7, 8, 9]] * 4
        assert model.cached == [0] * 4


def test_decode_feeds_one_token_at_a_time_behind_the_cache(clock: Clock) -> None:
    dense, moe = FakeModel(clock, 4e-3), FakeModel(clock, 1e-3)
    row = measure_decode(
        {"dense": dense, "moe": moe}, torch.tensor([[7, 8]]), 3, bound=8.0, repeats=2, warmup=1
    )
    # The prompt has 2 tokens, so the dense model proposes 20, then 30, then 40.
    one_round = [[7, 8], [20], [30], [40]]
    assert dense.fed == [[7, 8], [20], [30]] + one_round * 3  # the greedy continuation comes first
    assert moe.fed == one_round * 3
    assert moe.cached == [0, 2, 3, 4] * 3
    assert (row.phase, row.tokens) == ("decode", 3)
    assert (row.dense_ms, row.moe_ms) == pytest.approx((12.0, 3.0))  # 3 tokens, no prefill
    assert row.moe_tokens_per_second == pytest.approx(1000)
    assert (row.speedup, row.bound_share) == pytest.approx((4.0, 0.5))


def test_both_models_get_the_dense_models_tokens(clock: Clock) -> None:
    class Stubborn(FakeModel):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            output.logits = torch.eye(100)[5].reshape(1, 1, 100)
            return output

    dense, moe = FakeModel(clock), Stubborn(clock)
    measure_decode(
        {"dense": dense, "moe": moe}, torch.tensor([[7]]), 2, bound=1.0, repeats=1, warmup=0
    )
    assert moe.fed == [[7], [10], [20]]


def test_decode_on_a_real_model_equals_generate() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    fed: list[int] = []

    def record(_module: nn.Module, _arguments: Any, named: dict[str, Any]) -> None:
        if named["input_ids"].shape[1] == 1:
            fed.append(int(named["input_ids"]))

    prompt_1T = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model.generate(  # type: ignore[misc]
        prompt_1T, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    row = measure_decode(
        {"dense": model, "moe": model}, prompt_1T, 4, bound=1.0, repeats=1, warmup=0
    )
    handle.remove()
    assert fed[-4:] == expected[0, 5:].tolist()
    assert len(set(fed[-4:])) > 1
    assert row.dense_ms > 0


@pytest.mark.parametrize(
    ("keys", "shape", "new_tokens", "message"),
    [
        (("dense", "other"), (1, 3), 2, r"keys \['dense', 'other'\], not dense and moe"),
        (("dense", "moe"), (2, 3), 2, r"prompt of shape \(2, 3\), not \(1, T\)"),
        (("dense", "moe"), (1, 0), 2, r"prompt of shape \(1, 0\), not \(1, T\)"),
        (("dense", "moe"), (1, 3), 0, r"new_tokens=0 must be positive"),
    ],
)
def test_decode_rejects_misuse(
    clock: Clock, keys: tuple[str, str], shape: tuple[int, int], new_tokens: int, message: str
) -> None:
    models = {key: FakeModel(clock) for key in keys}
    ids_1T = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        measure_decode(models, ids_1T, new_tokens, bound=1.0, repeats=1, warmup=0)


def test_header() -> None:
    header = device_header(torch.bfloat16)
    assert header.dtype == "bfloat16"
    assert header.threads == torch.get_num_threads()
    assert header.versions["torch"] == torch.__version__
    assert header.device == cpu_name()
