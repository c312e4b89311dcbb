"""A converted FFN with an intercept or a threshold, constants of experts, another down matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients import assert_same_gradients
from masked_models import masked_model
from tiny_conversions import (
    Conversion,
    OpenTiny,
    account_of,
    ffns_of,
    load_converted,
    random_compensation,
    random_conversions,
    random_layout,
    random_router,
    write_converted,
)
from tiny_models import random_ids, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from weaver.algorithms.glu import GluWeights, glu_forward, glu_hidden
from weaver.artifacts.types import Compensation, ExpertLayout, Router
from weaver.evaluation.usage import count_usage
from weaver.kernels import ops
from weaver.models.accounting import LayerShape
from weaver.models.hf import converted_config, register
from weaver.models.moe import MoEFeedForward, converted_shape, converted_tensors

# Two inputs, the neurons 0..3 with h = (x0 * x0, x1 * x1, x0 * x1, x1 * x0) where x > 0.
IDENTITY = torch.eye(2)
WEIGHTS = GluWeights(
    gate_FD=IDENTITY[[0, 1, 0, 1]],
    up_FD=IDENTITY[[0, 1, 1, 0]],
    down_FD=torch.ones(4, 2),
    activation="relu",
    output_bias_D=torch.tensor([0.5, 0.25]),
)
# Neuron 2 is shared, neuron 3 the first expert, neuron 0 the second; neuron 1 is dropped.
LAYOUT = ExpertLayout(4, 1, torch.tensor([2]), torch.tensor([[3], [0]]), torch.full((2,), 9.0))
ROUTER = Router(
    kind="linear",
    weight_ED=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    scale_E=torch.zeros(2),
    balance_bias_E=torch.zeros(2),
    bias_E=torch.tensor([0.0, 4.0]),
)
COMPENSATION = Compensation(
    down_FD=torch.tensor([[1.0, 2.0], [77.0, 77.0], [3.0, 4.0], [5.0, 6.0]]),
    output_bias_D=torch.tensor([100.0, 200.0]),
    expert_bias_ED=torch.tensor([[1000.0, 2000.0], [-3000.0, -4000.0]]),
)


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_a_compensated_layer_by_hand(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    module = MoEFeedForward.convert(WEIGHTS, LAYOUT, ROUTER, COMPENSATION)
    # Logits x + (0, 4): token 0 (8, 5) takes expert 0, token 1 (3, 6) expert 1; without the
    # intercept token 2 (3, 5) would take expert 0.
    x_TD = torch.tensor([[8.0, 1.0], [3.0, 2.0], [3.0, 1.0]])
    # Shared: x0 x1 (3, 4). Expert 0: x0 x1 (5, 6) + (1000, 2000). Expert 1: x0^2 (1, 2) and its
    # constant. Last the bias of the dense FFN and that of the compensation, not that of the layout.
    assert module(x_TD).tolist() == [
        [24 + 40 + 1000 + 100.5, 32 + 48 + 2000 + 200.25],
        [18 + 9 - 3000 + 100.5, 24 + 18 - 4000 + 200.25],
        [9 + 9 - 3000 + 100.5, 12 + 18 - 4000 + 200.25],
    ]
    assert torch.equal(module(x_TD[None])[0], module(x_TD))


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_a_layer_with_a_threshold_by_hand(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    router = replace(ROUTER, bias_E=torch.tensor([-3.0, -1.5]))
    layout = replace(LAYOUT, selection="threshold")
    module = MoEFeedForward.convert(WEIGHTS, layout, router, COMPENSATION)
    assert module.shape.selection == "threshold"
    # Logits (5, -0.5), (0, 0.5), (1, 0.5) and (-2, -0.5): expert 0, expert 1, both, none.
    x_TD = torch.tensor([[8.0, 1.0], [3.0, 2.0], [4.0, 2.0], [1.0, 1.0]])
    assert module(x_TD).tolist() == [
        [24 + 40 + 1000 + 100.5, 32 + 48 + 2000 + 200.25],
        [18 + 9 - 3000 + 100.5, 24 + 18 - 4000 + 200.25],
        [24 + 40 + 1000 + 16 - 3000 + 100.5, 32 + 48 + 2000 + 32 - 4000 + 200.25],
        [3 + 100.5, 4 + 200.25],
    ]
    # The last token alone: not one pair.
    assert module(x_TD[3:]).tolist() == [[103.5, 204.25]]
    routing = module.routing(x_TD)
    assert routing is not None
    assert routing.counts_E().tolist() == [2, 2]


def test_a_compensation_replaces_only_what_it_has() -> None:
    plain = converted_tensors(WEIGHTS, LAYOUT, ROUTER)
    assert plain["output_bias"].tolist() == [9.5, 9.25]
    assert "expert_bias" not in plain
    expected = {
        "down_FD": ("down_weight", [[3.0, 4.0], [5.0, 6.0], [1.0, 2.0]]),
        "output_bias_D": ("output_bias", [100.5, 200.25]),
        "expert_bias_ED": ("expert_bias", [[1000.0, 2000.0], [-3000.0, -4000.0]]),
    }
    for field, tensor in COMPENSATION.tensors().items():
        found = converted_tensors(WEIGHTS, LAYOUT, ROUTER, Compensation(**{field: tensor}))
        name, value = expected[field]
        assert found[name].tolist() == value
        assert found.keys() == plain.keys() | {name}
        assert all(torch.equal(found[other], plain[other]) for other in found if other != name)


def test_the_layout_alone_decides_what_a_static_layer_keeps() -> None:
    none_EN = torch.zeros(0, 0, dtype=torch.int64)
    layout = ExpertLayout(4, 0, torch.tensor([0, 2]), none_EN)
    compensation = replace(COMPENSATION, expert_bias_ED=None)
    module = MoEFeedForward.convert(WEIGHTS, layout, None, compensation)
    # x0^2 (1, 2) + x0 x1 (3, 4) + both biases.
    assert module(torch.tensor([[2.0, 3.0]])).tolist() == [[4 + 18 + 100.5, 8 + 24 + 200.25]]
    assert converted_shape(WEIGHTS, layout, None, compensation) == module.shape


def test_constants_of_skipped_experts_keep_the_mean() -> None:
    """With ``b_e = -c_e`` and ``output_bias = sum_e c_e`` the mean output is the dense one's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = GluWeights(normal(48, 16), normal(48, 16), normal(48, 16), "silu")
    layout = random_layout(48, shared=8, experts=5, top_k=2)
    router = random_router("linear", 5, 16)
    x_TD = normal(64, 16)
    routing = MoEFeedForward.convert(weights, layout, router).routing(x_TD)
    assert routing is not None
    chosen_TE = routing.selected_TE()
    means = []
    for expert, neurons in enumerate(layout.experts_EN):
        part = weights.select(neurons)
        skipped_T = ~chosen_TE[:, expert]
        means.append((glu_hidden(x_TD[skipped_T], part) @ part.down_FD).mean(0))
    means_ED = torch.stack(means)
    compensation = Compensation(output_bias_D=means_ED.sum(0), expert_bias_ED=-means_ED)
    dense_TD = glu_forward(x_TD, weights)
    plain_TD = MoEFeedForward.convert(weights, layout, router)(x_TD)
    kept_TD = MoEFeedForward.convert(weights, layout, router, compensation)(x_TD)
    assert (plain_TD - dense_TD).mean(0).abs().max() > 0.5
    torch.testing.assert_close(kept_TD.mean(0), dense_TD.mean(0), rtol=1e-6, atol=1e-6)
    # With every expert selected the constants cancel, and the layer is the dense FFN.
    every = replace(layout, top_k=5)
    whole_TD = MoEFeedForward.convert(weights, every, router, compensation)(x_TD)
    torch.testing.assert_close(whole_TD, dense_TD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("compensation", "message"),
    [
        (Compensation(down_FD=torch.ones(3, 2)), r"down_FD of shape \(3, 2\), not \(4, 2\)"),
        (Compensation(output_bias_D=torch.ones(3)), r"output_bias_D of shape \(3,\), not \(2,\)"),
        (
            Compensation(expert_bias_ED=torch.ones(3, 2)),
            r"expert_bias_ED of shape \(3, 2\), not \(2, 2\)",
        ),
    ],
)
def test_a_compensation_of_another_layer(compensation: Compensation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEFeedForward.convert(WEIGHTS, LAYOUT, ROUTER, compensation)


def test_constants_of_experts_that_a_static_layer_does_not_have() -> None:
    layout = ExpertLayout(4, 0, torch.tensor([0]), torch.zeros(0, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expert_bias_ED of shape \(2, 2\), not \(0, 2\)"):
        MoEFeedForward.convert(WEIGHTS, layout, None, COMPENSATION)


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_gradients_reach_the_intercept_and_the_constants(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    router = replace(ROUTER, scale_E=torch.ones(2))
    module = MoEFeedForward.convert(WEIGHTS, LAYOUT, router, COMPENSATION).requires_grad_()
    x_TD = torch.tensor([[8.0, 1.0], [7.0, 1.0]])
    module(x_TD).sum().backward()
    assert module.router is not None
    assert module.router.bias is not None
    assert module.expert_bias is not None
    assert module.router.bias.grad is not None
    assert module.expert_bias.grad is not None
    # Both tokens take expert 0, with the factors 1 + p of p = sigmoid(8 - 5) and sigmoid(7 - 5).
    p_T = torch.tensor([3.0, 2.0]).sigmoid()
    row = float((1 + p_T).sum())
    torch.testing.assert_close(
        module.expert_bias.grad, torch.tensor([[row, row], [0.0, 0.0]]), rtol=1e-5, atol=1e-5
    )
    # dy/db_0 = p (1 - p) (sum of the expert's output, x0 x1 * 11 + 3000), and dy/db_1 = -dy/db_0.
    slope = float((p_T * (1 - p_T) * torch.tensor([88 + 3000.0, 77 + 3000.0])).sum())
    torch.testing.assert_close(
        module.router.bias.grad, torch.tensor([slope, -slope]), rtol=1e-4, atol=1e-3
    )


def test_both_paths_of_a_threshold_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD, down_FD = torch.randn(3, 48, 16, generator=generator, dtype=torch.float64)
    weights = GluWeights(gate_FD, up_FD, down_FD, "silu")
    layout = random_layout(48, shared=8, experts=5, top_k=2, selection="threshold")
    router = replace(random_router("linear", 5, 16, scale=0.5), bias_E=torch.full((5,), -2.0))
    x_TD = torch.randn(64, 16, generator=generator).double()
    compensation = random_compensation(48, 16, 5)
    found = []
    for path in ("masked", "grouped"):
        monkeypatch.setattr(ops, "choose_path", lambda *_, path=path: path)
        module = MoEFeedForward.convert(weights, layout, router, compensation).requires_grad_()
        routing = module.routing(x_TD)
        assert routing is not None
        assert set(routing.selected_TE().sum(1).tolist()) >= {0, 1, 2, 3}
        module(x_TD).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_autocast_is_the_kernel_in_16_bits(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: path)
    module = MoEFeedForward.convert(WEIGHTS, LAYOUT, ROUTER, COMPENSATION)
    module.requires_grad_(True)
    x_TD = torch.tensor([[1.01, 1.0], [3.0, 2.01], [3.0, 1.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found_TD = module(x_TD)
    assert found_TD.dtype == torch.bfloat16
    sixteen = MoEFeedForward.convert(WEIGHTS, LAYOUT, ROUTER, COMPENSATION).to(torch.bfloat16)
    assert torch.equal(found_TD, sixteen(x_TD.to(torch.bfloat16)))
    found_TD.float().sum().backward()
    assert x_TD.grad is not None
    assert x_TD.grad.dtype == torch.float32
    for name in ("gate_weight", "up_weight", "down_weight", "expert_bias"):
        grad = module.get_parameter(name).grad
        assert grad is not None, name
        assert grad.dtype == torch.float32
        assert grad.abs().max() > 0, name


def test_autocast_takes_a_static_layer() -> None:
    layout = ExpertLayout(4, 0, torch.tensor([2, 0]), torch.empty(0, 0, dtype=torch.int64))
    module = MoEFeedForward.convert(WEIGHTS, layout, None)
    x_TD = torch.tensor([[3.0, 2.0]])
    with torch.autocast("cpu", torch.bfloat16):
        found_TD = module(x_TD)
    assert found_TD.dtype == torch.bfloat16
    assert torch.equal(found_TD.float(), module(x_TD))


def generate(model: Any, ids_WT: Tensor, **options: Any) -> Any:
    """Greedy continuation by six tokens."""
    options |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(ids_WT, **options)


@pytest.mark.parametrize("path", ["masked", "grouped"])
def test_a_threshold_model_is_a_model_of_transformers(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    checkpoint = open_tiny("llama")
    conversions: list[Conversion] = [
        (layout, None if router is None else replace(router, bias_E=torch.full((5,), -1.0)))
        for layout, router in random_conversions(
            checkpoint, shared=8, experts=5, top_k=2, scale=0.5, selection="threshold"
        )
    ]
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", conversions))
    assert [entry["selection"] for entry in model.config.weaver["layers"]] == ["threshold"] * 3
    ids_WT = random_ids(2, 24)
    with torch.no_grad(), count_usage(model) as usage:
        expected = masked_model("llama", checkpoint, conversions)(ids_WT).logits
        monkeypatch.setattr(ops, "choose_path", lambda *_: path)
        # The definition has calibrated thresholds; pacing has tests of its own.
        paced = [ffn.pace for ffn in ffns_of(model)]
        for ffn in ffns_of(model):
            ffn.pace = None
        torch.testing.assert_close(model(ids_WT).logits, expected, rtol=1e-4, atol=1e-4)
    for ffn, pace in zip(ffns_of(model), paced, strict=True):
        ffn.pace = pace
    assert all(layer.experts_per_token % 1 > 0 for layer in usage.summary())
    model.save_pretrained(tmp_path / "again")
    again = load_converted(tmp_path / "again")
    assert again.config.weaver == model.config.weaver
    written = generate(model, ids_WT)
    assert torch.equal(generate(again, ids_WT), written)
    assert torch.equal(generate(model, ids_WT, use_cache=False), written)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(
    open_tiny: OpenTiny, tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = open_tiny("llama+bias", dtype=dtype)
    bias_E = torch.linspace(-1, 1, 5)
    conversions = [
        (layout, None if router is None else replace(router, bias_E=bias_E.clone()))
        for layout, router in random_conversions(checkpoint, shared=8, experts=5, top_k=2)
    ]
    compensations = [random_compensation(48, 32, 5, seed=layer) for layer in range(3)]
    folder = write_converted(
        checkpoint, tmp_path / "moe", conversions, dtype=dtype, compensations=compensations
    )
    model = load_converted(folder)
    for layer, ffn in enumerate(ffns_of(model)):
        expected = MoEFeedForward.convert(
            checkpoint.ffn(layer, dtype), *conversions[layer], compensations[layer]
        )
        ours, theirs = ffn.state_dict(), expected.state_dict()
        assert {"router.bias", "expert_bias", "output_bias"} < ours.keys()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.equal(ours["router.bias"], bias_E.to(dtype))
    model.save_pretrained(tmp_path / "again")
    again = load_converted(tmp_path / "again")
    ids_WT = random_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(again(ids_WT).logits, model(ids_WT).logits)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    account = account_of(checkpoint, conversions, compensations)
    assert account.total_parameters == sum(p.numel() for p in model.parameters())


def test_an_intercept_and_constants_start_at_zero() -> None:
    register()
    shape = LayerShape(8, 5, 8, 2, "linear", router_bias=True, expert_bias=True)
    model = AutoModelForCausalLM.from_config(
        converted_config(tiny_config("llama"), [shape] * 3, {})
    )
    for ffn in ffns_of(model):
        assert ffn.router is not None
        assert ffn.router.bias is not None
        assert ffn.expert_bias is not None
        assert ffn.router.bias.tolist() == [0.0] * 5
        assert torch.equal(ffn.expert_bias, torch.zeros(5, 32))
