"""Converted tiny models with the features that exports care about, and their stock forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny_conversions import Conversion, random_layout, random_router, write_converted
from tiny_models import random_ids, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from weaver.artifacts.types import Compensation, Router, RouterKind, Selection
from weaver.config.sections import ModelConfig
from weaver.export.attention import save_config
from weaver.export.base import Source, StockModel, Target
from weaver.export.features import approximated
from weaver.models.checkpoint import Checkpoint
from weaver.models.converted_folder import ConvertedCheckpoint, ConvertedLayer
from weaver.models.writing import write_shards

# Shared neurons, experts, width and top-k per layer: 48 neurons split alike, and not alike.
Split = tuple[int, int, int, int]
EQUAL: tuple[Split, ...] = ((16, 4, 8, 2),) * 3
# The second layer has fewer shared neurons and more experts, the third a remainder of one neuron.
UNEQUAL: tuple[Split, ...] = ((24, 3, 8, 1), (8, 5, 8, 3), (17, 4, 7, 2))


DTYPES = (torch.float32, torch.bfloat16)
# Rounding alone: KL in nats per token.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def plain_router(experts: int, hidden: int, seed: int, *, intercept: bool) -> Router:
    """A linear router without balance bias or scale."""
    router = random_router("linear", experts, hidden, seed=seed)
    bias_E = router.balance_bias_E * 10 if intercept else None
    return replace(router, balance_bias_E=torch.zeros(experts), bias_E=bias_E)


def conversions_of(
    checkpoint: Checkpoint,
    splits: Sequence[Split],
    *,
    intercept: bool = False,
    kind: RouterKind = "linear",
    selection: Selection = "top-k",
    scale: float | None = None,
    **weighting: Any,
) -> list[Conversion]:
    """A layout and a router per layer.

    Args:
        checkpoint: the dense model.
        splits: of every layer.
        intercept: routers have one.
        kind: of the routers.
        selection: how experts are chosen.
        scale: None for routers without balance bias and scale; else their scale.
        weighting: how experts are weighted, as of a layout.
    """
    conversions: list[Conversion] = []
    for layer, (shared, experts, width, top_k) in enumerate(splits):
        layout = random_layout(
            checkpoint.intermediate_size,
            shared=shared,
            experts=experts,
            top_k=top_k,
            width=width,
            seed=layer,
            selection=selection,
            **weighting,
        )
        hidden = checkpoint.hidden_size
        if kind == "linear" and scale is None:
            router = plain_router(experts, hidden, layer, intercept=intercept)
        else:
            router = random_router(kind, experts, hidden, seed=layer, scale=scale or 0.0)
        conversions.append((layout, replace(router, **weighting) if experts else None))
    return conversions


def save_converted(
    folder: Path,
    variant: str,
    splits: Sequence[Split],
    *,
    dtype: torch.dtype = torch.float32,
    compensations: Sequence[Compensation] | None = None,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> ConvertedCheckpoint:
    """A converted tiny model on disk; options as of ``conversions_of``."""
    save_tiny_model(variant, folder / "dense", byte_tokenizer(), dtype=dtype, **(changes or {}))
    checkpoint = Checkpoint(ModelConfig(path=str(folder / "dense")))
    conversions = conversions_of(checkpoint, splits, **options)
    write_converted(
        checkpoint, folder / "own", conversions, dtype=dtype, compensations=compensations
    )
    return ConvertedCheckpoint(folder / "own")


def ffn_inputs(layer: int, hidden: int) -> Tensor:
    """FFN inputs as behind a norm, (256, D)."""
    return torch.randn(256, hidden, generator=torch.Generator().manual_seed(layer))


def source_of(
    checkpoint: ConvertedCheckpoint, *, approximate: bool = False, softmax: bool = False
) -> Source:
    """Build an export's ``Source`` from a converted model, with approximated layers on request."""
    hidden = checkpoint.config.hidden_size

    def layer(index: int) -> ConvertedLayer:
        converted = checkpoint.layer(index)
        inputs_TD = ffn_inputs(index, hidden)
        return approximated(converted, inputs_TD, softmax=softmax) if approximate else converted

    return Source(
        checkpoint,
        lambda index: ffn_inputs(index, hidden),
        layer,
        checkpoint.dtype,
    )


def write_stock(folder: Path, target: Target, source: Source) -> StockModel:
    """Write a stock form of a model."""
    stock = target.build(source)
    write_shards(folder, stock.parts, 10**9, lambda _name: None)
    save_config(stock.config, folder)
    return stock


def load_stock(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A stock model by transformers' own class; every key must fit."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0]
    assert not loaded[1]["missing_keys"]
    assert not loaded[1]["unexpected_keys"]
    model.eval()
    return model


def add_values(folder: Path, suffix: str, value: float) -> None:
    """Fill every tensor of a name with a value, as training would have moved it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = {
        k: torch.full_like(v, value) if k.endswith(suffix) else v for k, v in tensors.items()
    }
    save_file(changed, path, metadata={"format": "pt"})


@torch.no_grad()
def outputs(model: PreTrainedModel, ids_WT: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities in float64 and the hidden states of every layer."""
    output = model(input_ids=ids_WT, output_hidden_states=True, use_cache=False)
    return output.logits.double().log_softmax(-1), list(output.hidden_states)


def assert_same(own: PreTrainedModel, stock: PreTrainedModel, dtype: torch.dtype) -> None:
    ids_WT = random_ids(4, 32)
    log_p, layers = outputs(own, ids_WT)
    log_q, stock_layers = outputs(stock, ids_WT)
    assert len(layers) == len(stock_layers) == 4
    tolerance = 2e-3 if dtype is torch.float32 else 0.1
    for layer, other in zip(layers, stock_layers, strict=True):
        assert (layer - other).float().norm() < tolerance * layer.float().norm()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert 0 <= kl < LIMITS[dtype]
