"""Converted FFNs whose chosen experts are weighted by a softmax, and may overlap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradients import assert_same_gradients
from masked_models import masked_model
from tiny_conversions import (
    OpenTiny,
    account_of,
    ffns_of,
    load_converted,
    overlapping_conversions,
    random_compensation,
    random_conversions,
    random_layout,
    random_router,
    write_converted,
)
from tiny_models import random_ids

from weaver.algorithms.glu import GluWeights
from weaver.kernels import ops
from weaver.models.moe import MoEFeedForward


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize(("top_k", "scaling"), [(1, 0.5), (2, 1.0), (2, 2.0)])
def test_a_model_with_softmax_weights(
    open_tiny: OpenTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    top_k: int,
    scaling: float,
) -> None:
    checkpoint = open_tiny("llama")
    conversions = random_conversions(
        checkpoint, shared=8, experts=5, top_k=top_k, weighting="softmax", routed_scaling=scaling
    )
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", conversions))
    entries = model.config.weaver["layers"]
    assert [entry["weighting"] for entry in entries] == ["softmax"] * 3
    assert [entry["routed_scaling"] for entry in entries] == [scaling] * 3
    ids_WT = random_ids(2, 24)
    with torch.no_grad():
        expected = masked_model("llama", checkpoint, conversions)(ids_WT).logits
        monkeypatch.setattr(ops, "choose_path", lambda *_: path)
        torch.testing.assert_close(model(ids_WT).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert load_converted(tmp_path / "again").config.weaver == model.config.weaver


@pytest.mark.parametrize("path", ["masked", "grouped"])
@pytest.mark.parametrize(("top_k", "shared"), [(1, 0), (2, 4)])
def test_a_model_whose_experts_overlap(
    open_tiny: OpenTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    top_k: int,
    shared: int,
) -> None:
    """Rows are stored as often as experts hold them, and may then be trained apart."""
    checkpoint = open_tiny("llama")
    conversions = overlapping_conversions(
        checkpoint, experts=4, width=20, top_k=top_k, shared=shared
    )
    model = load_converted(write_converted(checkpoint, tmp_path / "moe", conversions))
    ids_WT = random_ids(2, 24)
    with torch.no_grad():
        expected = masked_model("llama", checkpoint, conversions)(ids_WT).logits
        monkeypatch.setattr(ops, "choose_path", lambda *_: path)
        torch.testing.assert_close(model(ids_WT).logits, expected, rtol=1e-4, atol=1e-4)
    ffn = ffns_of(model)[0]
    assert ffn.gate_weight.shape == (shared + 80, checkpoint.hidden_size)
    account = account_of(checkpoint, conversions)
    assert account.total_parameters == sum(p.numel() for p in model.parameters())
    assert account.total_parameters > account.total_dense_parameters
    active = shared + 20 * top_k
    assert account.ffn_sparsity == pytest.approx(1 - active / 48)
    hidden = checkpoint.hidden_size
    assert account.ffn_flops == 3 * 2 * hidden * (3 * active + 4)
    unused = (80 - 20 * top_k) * 3 * hidden * 3
    assert account.total_parameters - account.active_parameters == unused


def test_both_paths_train_the_router_and_leave_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with one expert per token, where the weight is a constant and its gradient is not."""
    generator = torch.Generator().manual_seed(0)
    gate_FD, up_FD, down_FD = torch.randn(3, 48, 16, generator=generator, dtype=torch.float64)
    weights = GluWeights(gate_FD, up_FD, down_FD, "silu")
    x_TD = torch.randn(64, 16, generator=generator).double()
    for top_k in (1, 2):
        layout = random_layout(48, shared=8, experts=5, top_k=top_k, weighting="softmax")
        router = random_router("linear", 5, 16, scale=0.5, weighting="softmax")
        router = replace(router, bias_E=torch.full((5,), -2.0))
        found = []
        for path in ("masked", "grouped"):
            monkeypatch.setattr(ops, "choose_path", lambda *_, path=path: path)
            compensation = random_compensation(48, 16, 5)
            module = MoEFeedForward.convert(weights, layout, router, compensation).requires_grad_()
            module(x_TD).square().sum().backward()
            found.append({name: parameter.grad for name, parameter in module.named_parameters()})
        assert found[0].pop("router.scale") is None
        assert found[1].pop("router.scale") is None
        assert_same_gradients(found[1], found[0])
