"""Stock architectures and layers whose chosen experts are weighted by a softmax, or overlap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from exports import (
    DTYPES,
    EQUAL,
    assert_same,
    load_stock,
    plain_router,
    save_converted,
    source_of,
    write_stock,
)
from tiny_conversions import (
    Conversion,
    ffns_of,
    load_converted,
    overlapping_conversions,
    write_converted,
)
from tiny_models import save_tiny_model

from weaver.config.sections import ModelConfig
from weaver.export import glm4_moe, granite_moe_shared
from weaver.export.base import Target
from weaver.models.checkpoint import Checkpoint
from weaver.models.converted_folder import ConvertedCheckpoint


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routed_scaling", [1.0, 2.0])
def test_granite_holds_softmax_weights(
    routed_scaling: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    weighting: dict[str, Any] = {"weighting": "softmax", "routed_scaling": routed_scaling}
    checkpoint = save_converted(tmp_path, "llama", EQUAL, dtype=dtype, **weighting)
    assert granite_moe_shared.TARGET.obstacles(checkpoint, dtype) == []
    stock = write_stock(tmp_path / "stock", granite_moe_shared.TARGET, source_of(checkpoint))
    assert stock.facts["router_scale"] == [1.0] * 3
    own = load_converted(checkpoint.folder)
    assert_same(own, load_stock(tmp_path / "stock", dtype), dtype)
    # The weights matter: with equal ones the model is another.
    for ffn in ffns_of(own):
        assert ffn.router is not None
        ffn.router.weighting, ffn.router.routed_scaling = "unit", 1.0
    with pytest.raises(AssertionError):
        assert_same(own, load_stock(tmp_path / "stock", dtype), dtype)
    approximate = source_of(checkpoint, approximate=True, softmax=granite_moe_shared.TARGET.softmax)
    write_stock(tmp_path / "approximate", granite_moe_shared.TARGET, approximate)
    kept = load_stock(tmp_path / "approximate", dtype)
    assert_same(load_converted(checkpoint.folder), kept, dtype)


def test_a_factor_that_is_no_power_of_two_is_rounded_in_16_bits(tmp_path: Path) -> None:
    weighting: dict[str, Any] = {"weighting": "softmax", "routed_scaling": 1.5}
    checkpoint = save_converted(tmp_path, "llama", EQUAL, **weighting)
    found = granite_moe_shared.TARGET.obstacles(checkpoint, torch.bfloat16)
    assert [o.what for o in found] == ["down projections times 1.5 in 16 bits"]
    assert granite_moe_shared.TARGET.obstacles(checkpoint, torch.float32) == []


@pytest.mark.parametrize("target", [glm4_moe.TARGET, granite_moe_shared.TARGET])
def test_the_softmax_over_one_expert_is_no_obstacle(target: Target, tmp_path: Path) -> None:
    checkpoint = save_converted(tmp_path, "llama", ((16, 4, 8, 1),) * 3, weighting="softmax")
    assert target.obstacles(checkpoint, torch.float32) == []
    write_stock(tmp_path / "stock", target, source_of(checkpoint))
    stock = load_stock(tmp_path / "stock", torch.float32)
    assert_same(load_converted(checkpoint.folder), stock, torch.float32)


@pytest.mark.parametrize(
    ("target", "top_k"),
    [(glm4_moe.TARGET, 1), (granite_moe_shared.TARGET, 1), (granite_moe_shared.TARGET, 2)],
)
def test_experts_that_overlap_are_no_obstacle(target: Target, top_k: int, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "dense", byte_tokenizer())
    dense = Checkpoint(ModelConfig(path=str(tmp_path / "dense")))
    conversions: list[Conversion] = [
        (layout, replace(plain_router(4, 32, i, intercept=False), weighting="softmax"))
        for i, (layout, _) in enumerate(
            overlapping_conversions(dense, experts=4, width=20, top_k=top_k, shared=4)
        )
    ]
    write_converted(dense, tmp_path / "own", conversions)
    checkpoint = ConvertedCheckpoint(tmp_path / "own")
    assert target.obstacles(checkpoint, torch.float32) == []
    write_stock(tmp_path / "stock", target, source_of(checkpoint))
    stock = load_stock(tmp_path / "stock", torch.float32)
    assert_same(load_converted(checkpoint.folder), stock, torch.float32)
