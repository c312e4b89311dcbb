"""The types that stages exchange, to disk and back."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from weaver.artifacts.record import TensorRecord
from weaver.artifacts.store import read_record, write_record, write_tensors
from weaver.artifacts.types import (
    Compensation,
    ExpertLayout,
    LayerProfile,
    Router,
)
from weaver.errors import WeaverError


def profile() -> LayerProfile:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return LayerProfile(
        sample_gate_mean_MF=normal(2, 6),
        sample_gate_abs_mean_MF=normal(2, 6).abs(),
        sample_tokens_M=torch.tensor([3, 4]),
        sample_groups_M=torch.tensor([0, 1]),
        hidden_mean_F=normal(6),
        hidden_variance_F=normal(6).abs(),
        marker_neurons_TA=torch.randint(0, 6, (7, 2), generator=generator, dtype=torch.int32),
        ffn_inputs_ND=normal(5, 4).to(torch.bfloat16),
        tokens=7,
    )


def layout(*, bias: bool) -> ExpertLayout:
    return ExpertLayout(
        intermediate_size=6,
        top_k=1,
        shared_S=torch.tensor([5, 0]),
        experts_EN=torch.tensor([[1, 2], [4, 3]]),
        output_bias_D=torch.ones(4) if bias else None,
    )


def static_layout() -> ExpertLayout:
    none_EN = torch.zeros(0, 0, dtype=torch.int64)
    return ExpertLayout(6, 0, torch.tensor([1, 3]), none_EN, torch.ones(4))


def router(*, glu: bool, intercept: bool = False) -> Router:
    return Router(
        kind="glu" if glu else "linear",
        weight_ED=torch.randn(3, 4),
        scale_E=torch.zeros(3),
        balance_bias_E=torch.ones(3),
        up_weight_ED=torch.randn(3, 4) if glu else None,
        bias_E=torch.randn(3) if intercept else None,
    )


@pytest.mark.parametrize(
    "record",
    [
        profile(),
        layout(bias=False),
        layout(bias=True),
        static_layout(),
        router(glu=False),
        router(glu=True),
        router(glu=False, intercept=True),
        Compensation(torch.randn(6, 4), torch.randn(4), torch.randn(3, 4)),
        Compensation(output_bias_D=torch.randn(4)),
    ],
)
def test_every_record_comes_back(tmp_path: Path, record: TensorRecord) -> None:
    path = tmp_path / "x.safetensors"
    write_record(path, record)
    found = read_record(path, type(record))
    for field in fields(record):  # type: ignore[arg-type]
        ours, theirs = getattr(found, field.name), getattr(record, field.name)
        assert type(ours) is type(theirs)
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_a_record_of_another_type(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_record(path, layout(bias=False))
    with pytest.raises(WeaverError, match=r"x\.safetensors: not a valid Router") as caught:
        read_record(path, Router, rebuild="weaver build-router")
    assert caught.value.fix == "weaver build-router"


def test_a_record_whose_values_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    good = layout(bias=False)
    write_tensors(path, good.tensors() | {"shared_S": torch.tensor([1])}, good.scalars())
    with pytest.raises(WeaverError, match="not a valid ExpertLayout") as caught:
        read_record(path, ExpertLayout)
    assert caught.value.why == "a neuron is assigned twice"
