"""Converted models that between them have everything a converted layer can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tiny_conversions import (
    Conversion,
    overlapping_conversions,
    random_compensation,
    random_conversions,
    random_layout,
    random_router,
    write_converted,
)

from weaver.artifacts.types import Compensation
from weaver.models.checkpoint import Checkpoint

Feature = Callable[[Checkpoint], tuple[list[Conversion], list[Compensation] | None]]


def _top_k(checkpoint: Checkpoint) -> tuple[list[Conversion], None]:
    return random_conversions(checkpoint, shared=8, experts=5, top_k=2, scale=0.5), None


def _glu(checkpoint: Checkpoint) -> tuple[list[Conversion], None]:
    found = random_conversions(checkpoint, shared=0, experts=6, top_k=2, kind="glu", scale=1.0)
    return found, None


def _threshold(checkpoint: Checkpoint) -> tuple[list[Conversion], None]:
    found = random_conversions(
        checkpoint, shared=8, experts=5, top_k=2, scale=0.5, selection="threshold"
    )
    return [_with_intercept(conversion, torch.full((5,), -1.0)) for conversion in found], None


def _softmax(checkpoint: Checkpoint) -> tuple[list[Conversion], None]:
    found = random_conversions(
        checkpoint, shared=8, experts=5, top_k=2, weighting="softmax", routed_scaling=1.5
    )
    return found, None


def _overlap(checkpoint: Checkpoint) -> tuple[list[Conversion], list[Compensation]]:
    """Experts with neurons in common, and each with a constant of its own."""
    found = overlapping_conversions(checkpoint, experts=4, width=24, top_k=2)
    generator = torch.Generator().manual_seed(0)
    size = (4, checkpoint.hidden_size)
    biases = [torch.randn(size, generator=generator) for _ in found]
    return found, [Compensation(expert_bias_ED=bias_ED) for bias_ED in biases]


def _compensated(checkpoint: Checkpoint) -> tuple[list[Conversion], list[Compensation]]:
    bias_E = torch.linspace(-1, 1, 5)
    found, _ = _top_k(checkpoint)
    sizes = (checkpoint.intermediate_size, checkpoint.hidden_size, 5)
    compensations = [random_compensation(*sizes, seed=layer) for layer in range(len(found))]
    return [_with_intercept(conversion, bias_E.clone()) for conversion in found], compensations


def _mixed(checkpoint: Checkpoint) -> tuple[list[Conversion], None]:
    """Every layer of another shape; the second is static and has an output bias."""
    width, bias_D = checkpoint.hidden_size, torch.linspace(-1, 1, checkpoint.hidden_size)
    threshold = random_layout(48, shared=8, experts=5, top_k=2, selection="threshold")
    linear = (threshold, random_router("linear", 5, width, scale=0.5))
    static = random_layout(48, shared=24, experts=0, top_k=0, output_bias_D=bias_D)
    glu = (random_layout(48, shared=0, experts=4, top_k=1), random_router("glu", 4, width))
    return [_with_intercept(linear, torch.full((5,), -1.0)), (static, None), glu], None


FEATURES: dict[str, Feature] = {
    "top-k": _top_k,
    "glu": _glu,
    "threshold": _threshold,
    "softmax": _softmax,
    "overlap": _overlap,
    "compensated": _compensated,
    "mixed": _mixed,
}


def write_featured(
    checkpoint: Checkpoint, feature: str, folder: Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a converted model with a feature of ``FEATURES``."""
    conversions, compensations = FEATURES[feature](checkpoint)
    return write_converted(
        checkpoint, folder, conversions, dtype=dtype, compensations=compensations
    )


def _with_intercept(conversion: Conversion, bias_E: torch.Tensor) -> Conversion:
    layout, router = conversion
    assert router is not None
    return layout, replace(router, bias_E=bias_E)
