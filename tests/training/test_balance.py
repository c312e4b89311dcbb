"""The balance bias and the counting of expert loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_conversions import random_layout, random_router
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from weaver.algorithms.glu import GluWeights
from weaver.kernels.reference import Routing
from weaver.models.moe import MoEFeedForward
from weaver.training.balance import (
    Balance,
    ExpertLoad,
    ExpertLoadCounter,
    balance_loss,
    balance_step,
    routed_layers,
)


def test_balance_step_by_hand() -> None:
    # The target is 4: 8 is above, 0 below, 4 stays.
    load_E, bias_E = torch.tensor([8, 0, 4, 4]), torch.tensor([0.5, 0.5, 0.5, -0.5])
    moved_E = balance_step(load_E, 4.0, bias_E, 0.25)
    assert torch.equal(moved_E, torch.tensor([0.25, 0.75, 0.5, -0.5]))


def test_bias_keeps_its_dtype() -> None:
    bias_E = torch.zeros(2, dtype=torch.bfloat16)
    moved_E = balance_step(torch.tensor([1, 3]), 2.0, bias_E, 0.5)
    assert moved_E.tolist() == [0.5, -0.5]
    assert moved_E.dtype == torch.bfloat16


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16), st.floats(0, 1), st.integers(0))
def test_every_expert_moves_toward_the_target(loads: list[int], update: float, total: int) -> None:
    bias_E = torch.zeros(len(loads), dtype=torch.float64)
    moved_E = balance_step(torch.tensor(loads), total / len(loads), bias_E, update)
    for load, moved in zip(loads, moved_E.tolist(), strict=True):
        below, above = load * len(loads) < total, load * len(loads) > total
        assert moved == update * (below - above)


def test_balance_step_rejects_misuse() -> None:
    with pytest.raises(ValueError, match=r"load \(2,\) and bias \(3,\) differ"):
        balance_step(torch.zeros(2), 1.0, torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match=r"update=-0.1"):
        balance_step(torch.zeros(2), 1.0, torch.zeros(2), -0.1)


def test_balance_loss_by_hand() -> None:
    load = ExpertLoad(torch.tensor([6, 2, 0, 0]), 4)
    # 4 * (3/4 * 0.5 + 1/4 * 0.2)
    assert balance_loss(torch.tensor([0.5, 0.2, 0.2, 0.1]), load).item() == pytest.approx(1.7)
    even = ExpertLoad(torch.tensor([2, 2, 2, 2]), 4)
    assert balance_loss(torch.full((4,), 0.25), even).item() == 1
    assert balance_loss(torch.full((4,), 0.25), ExpertLoad(torch.zeros(4), 4)).item() == 0


def test_the_loss_over_all_layers_reaches_the_routers(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.requires_grad = True
    with ExpertLoadCounter(model, probabilities=True) as counter:
        model(input_ids=windows_WT[:4])
        loads = counter.take()
        loss = counter.loss(loads)
    assert loss.item() >= 0.5
    loss.backward()
    for name, layer in routed_layers(model).items():
        grad = layer.router.weight.grad
        assert grad is not None, name
        assert grad.abs().max() > 0, name


def test_descending_the_loss_evens_the_loads_out(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    model = make_model()
    layers = routed_layers(model)
    routers = [layer.router.weight for layer in layers.values()]
    with torch.no_grad():
        for weight_ED in routers:
            weight_ED[0] += 0.5 * weight_ED[1]
    optimizer = torch.optim.Adam(routers, lr=1e-2)
    ids_BT = torch.randint(0, 40, (8, 32), generator=torch.Generator().manual_seed(1))
    peaks = []
    for _ in range(60):
        with ExpertLoadCounter(model, probabilities=True) as counter:
            model(input_ids=ids_BT)
            loads = counter.take()
            loss = counter.loss(loads)
        balance = Balance.of(loads)
        assert balance is not None
        peaks.append(balance.max_over_mean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(peaks[-10:]) < 0.95 * sum(peaks[:10])


def test_balance_by_hand() -> None:
    loads = {
        "0": ExpertLoad(torch.tensor([6, 2, 0, 0]), 4),
        "1": ExpertLoad(torch.tensor([2, 2, 2, 2]), 4),
    }
    balance = Balance.of(loads)
    assert balance == Balance(max_over_mean=(3 + 1) / 2, idle=2 / 8)
    assert Balance.of({}) is None
    assert Balance.of({"0": ExpertLoad(torch.zeros(4, dtype=torch.int64), 4)}) is None


def test_counter_counts_what_routing_selects(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    model = make_model()
    layers = routed_layers(model)
    assert list(layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, routing: Callable[[Tensor], Routing | None]) -> Any:
        def recorded(x_TD: Tensor) -> Routing:
            found = routing(x_TD)
            assert found is not None
            seen[name].append(found.experts_P)
            return found

        return recorded

    with ExpertLoadCounter(model) as counter:
        model(input_ids=windows_WT)
        model(input_ids=windows_WT[:2])
        loads = counter.take()
        assert counter.take() == {}
    for name, layer in layers.items():
        object.__setattr__(layer, "routing", record(name, layer.routing))
    model(input_ids=windows_WT)
    model(input_ids=windows_WT[:2])
    for name, load in loads.items():
        experts_P = torch.cat(seen[name])
        assert load.counts_E.tolist() == torch.bincount(experts_P, minlength=4).tolist()
        assert load.tokens == (6 + 2) * 12
        assert int(load.counts_E.sum()) == load.tokens * 2


def test_closed_counter_counts_nothing(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    model = make_model()
    with ExpertLoadCounter(model) as counter:
        pass
    model(input_ids=windows_WT)
    assert counter.take() == {}


def test_repeated_steps_balance_the_load(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    name = "model.layers.0.mlp"
    # Expert 0 starts far ahead: every token chooses it.
    model.get_buffer(f"{name}.router.balance_bias")[0] = 0.6
    ids_BT = torch.randint(0, 40, (8, 32), generator=torch.Generator().manual_seed(1))

    def spread(load: ExpertLoad) -> float:
        return float(load.counts_E.double().std() / load.counts_E.double().mean())

    with ExpertLoadCounter(model) as counter:
        model(input_ids=ids_BT)
        before = spread(counter.take()[name])
        for _ in range(80):
            model(input_ids=ids_BT)
            counter.apply(counter.take(), 0.01)
        model(input_ids=ids_BT)
        after = spread(counter.take()[name])
    assert before > 0.5
    assert after < 0.5 * before


def test_a_threshold_is_led_back_to_its_mean() -> None:
    """Four experts that all tokens select come down to two a token, equally loaded."""
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD, down_FD = torch.randn(3, 8, 6, generator=generator)
    weights = GluWeights(gate_FD, up_FD, down_FD, "silu")
    layout = random_layout(8, shared=0, experts=4, top_k=2, selection="threshold")
    router = replace(random_router("linear", 4, 6), bias_E=torch.full((4,), 9.0))
    ffn = MoEFeedForward.convert(weights, layout, router)
    x_TD = torch.randn(512, 6, generator=generator)
    with ExpertLoadCounter(nn.Sequential(ffn)) as counter:
        ffn(x_TD)
        assert counter.take()["0"].counts_E.min() > 450
        for _ in range(150):
            ffn(x_TD)
            counter.apply(counter.take(), 0.1)
        ffn(x_TD)
        load = counter.take()["0"]
    assert load.counts_E.tolist() == pytest.approx([256] * 4, rel=0.1)


def test_static_layers_are_left_out(make_model: Callable[..., LlamaForCausalLM]) -> None:
    assert routed_layers(make_model(static=True)) == {}
