"""The balance bias and the counting of expert loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from weaver.training.balance import ExpertLoadCounter, balance_step, routed_layers


def test_balance_step_by_hand() -> None:
    # The mean load is 4: 8 is above, 0 below, 4 stays.
    load_E, bias_E = torch.tensor([8, 0, 4, 4]), torch.tensor([0.5, 0.5, 0.5, -0.5])
    assert torch.equal(balance_step(load_E, bias_E, 0.25), torch.tensor([0.25, 0.75, 0.5, -0.5]))


def test_bias_keeps_its_dtype() -> None:
    bias_E = torch.zeros(2, dtype=torch.bfloat16)
    assert balance_step(torch.tensor([1, 3]), bias_E, 0.5).tolist() == [0.5, -0.5]
    assert balance_step(torch.tensor([1, 3]), bias_E, 0.5).dtype == torch.bfloat16


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16), st.floats(0, 1))
def test_every_expert_moves_toward_the_mean(loads: list[int], update: float) -> None:
    bias_E = torch.zeros(len(loads), dtype=torch.float64)
    moved_E = balance_step(torch.tensor(loads), bias_E, update)
    for load, moved in zip(loads, moved_E.tolist(), strict=True):
        below = load * len(loads) < sum(loads)
        above = load * len(loads) > sum(loads)
        assert moved == update * (below - above)


def test_balance_step_rejects_misuse() -> None:
    with pytest.raises(ValueError, match=r"load \(2,\) and bias \(3,\) differ"):
        balance_step(torch.zeros(2), torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match=r"update=-0.1"):
        balance_step(torch.zeros(2), torch.zeros(2), -0.1)


def test_counter_counts_what_route_selects(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    model = make_model()
    layers = routed_layers(model)
    assert list(layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def record(name: str, route: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Any:
        def recorded(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            ids_TK, weights_TK = route(x_TD)
            seen[name].append(ids_TK)
            return ids_TK, weights_TK

        return recorded

    with ExpertLoadCounter(model) as counter:
        model(input_ids=windows_WT)
        model(input_ids=windows_WT[:2])
        loads = counter.take()
        assert counter.take() == {}
    for name, layer in layers.items():
        object.__setattr__(layer, "route", record(name, layer.route))
    model(input_ids=windows_WT)
    model(input_ids=windows_WT[:2])
    for name, load_E in loads.items():
        ids = torch.cat([ids_TK.reshape(-1) for ids_TK in seen[name]])
        assert load_E.tolist() == torch.bincount(ids, minlength=4).tolist()
        assert int(load_E.sum()) == (6 + 2) * 12 * 2


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

    def spread(load_E: Tensor) -> float:
        return float(load_E.double().std() / load_E.double().mean())

    with ExpertLoadCounter(model) as counter:
        model(input_ids=ids_BT)
        before = spread(counter.take()[name])
        for _ in range(80):
            model(input_ids=ids_BT)
            counter.apply(0.01)
        model(input_ids=ids_BT)
        after = spread(counter.take()[name])
    assert before > 0.5
    assert after < 0.5 * before


def test_static_layers_are_left_out(make_model: Callable[..., LlamaForCausalLM]) -> None:
    assert routed_layers(make_model(static=True)) == {}
