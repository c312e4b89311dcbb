"""Random layouts and routers, and the way from a checkpoint to a converted model folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from weaver.artifacts.types import (
    Compensation,
    ExpertLayout,
    Router,
    RouterKind,
    Selection,
    Weighting,
)
from weaver.models.accounting import LayerShape, ModelAccount
from weaver.models.checkpoint import Checkpoint
from weaver.models.hf import converted_config, register
from weaver.models.moe import MoEFeedForward, converted_shape, converted_tensors
from weaver.models.writing import converted_parts, write_shards

OpenTiny = Callable[..., Checkpoint]
Conversion = tuple[ExpertLayout, Router | None]


def random_layout(
    intermediate_size: int,
    *,
    shared: int,
    experts: int,
    top_k: int,
    width: int | None = None,
    seed: int = 0,
    output_bias_D: Tensor | None = None,
    selection: Selection = "top-k",
    weighting: Weighting = "unit",
    routed_scaling: float = 1.0,
) -> ExpertLayout:
    """A layout of randomly chosen neurons; by default every neuron that is not shared is routed."""
    order = torch.randperm(intermediate_size, generator=torch.Generator().manual_seed(seed))
    if width is None:
        width = (intermediate_size - shared) // experts if experts else 0
    routed = order[shared : shared + experts * width]
    return ExpertLayout(
        intermediate_size=intermediate_size,
        top_k=top_k,
        shared_S=order[:shared],
        experts_EN=routed.reshape(experts, width),
        output_bias_D=output_bias_D,
        selection=selection,
        weighting=weighting,
        routed_scaling=routed_scaling,
    )


def overlapping_layout(
    intermediate_size: int,
    *,
    experts: int,
    width: int,
    top_k: int,
    shared: int = 0,
    seed: int = 0,
    expert_bias_ED: Tensor | None = None,
) -> ExpertLayout:
    """Experts that are random prunings of the whole FFN, weighted by a softmax."""
    generator = torch.Generator().manual_seed(seed)
    shared_S = torch.arange(shared)

    def expert() -> Tensor:
        ids_n = shared + torch.randperm(intermediate_size - shared, generator=generator)[:width]
        return ids_n.sort().values

    return ExpertLayout(
        intermediate_size,
        top_k,
        shared_S,
        torch.stack([expert() for _ in range(experts)]),
        weighting="softmax",
        overlap=True,
        expert_bias_ED=expert_bias_ED,
    )


def overlapping_conversions(
    checkpoint: Checkpoint, *, experts: int, width: int, top_k: int, shared: int = 0
) -> list[Conversion]:
    """A different overlapping layout and router for every layer."""
    conversions: list[Conversion] = []
    for layer in range(checkpoint.num_layers):
        sizes: dict[str, Any] = {
            "experts": experts,
            "width": width,
            "top_k": top_k,
            "shared": shared,
        }
        layout = overlapping_layout(checkpoint.intermediate_size, **sizes, seed=layer)
        hidden = checkpoint.hidden_size
        router = random_router("linear", experts, hidden, seed=layer, weighting="softmax")
        conversions.append((layout, router))
    return conversions


def random_router(
    kind: RouterKind,
    experts: int,
    hidden_size: int,
    *,
    seed: int = 0,
    scale: float = 0.0,
    weighting: Weighting = "unit",
    routed_scaling: float = 1.0,
) -> Router:
    """A router whose choices depend on the token, with a balance bias that matters."""
    generator = torch.Generator().manual_seed(seed)

    def matrix() -> Tensor:
        return torch.randn(experts, hidden_size, generator=generator)

    return Router(
        kind=kind,
        weight_ED=matrix(),
        scale_E=torch.full((experts,), scale),
        balance_bias_E=0.1 * torch.randn(experts, generator=generator),
        up_weight_ED=matrix() if kind == "glu" else None,
        weighting=weighting,
        routed_scaling=routed_scaling,
    )


def random_conversions(
    checkpoint: Checkpoint,
    *,
    shared: int,
    experts: int,
    top_k: int,
    kind: RouterKind = "linear",
    scale: float = 0.0,
    width: int | None = None,
    selection: Selection = "top-k",
    weighting: Weighting = "unit",
    routed_scaling: float = 1.0,
) -> list[Conversion]:
    """A different layout and router for every layer, or every expert of a MoE model."""
    conversions: list[Conversion] = []
    combined: dict[str, Any] = {"weighting": weighting, "routed_scaling": routed_scaling}
    for layer in range(checkpoint.num_sites):
        layout = random_layout(
            checkpoint.neurons(layer),
            shared=shared,
            experts=experts,
            top_k=top_k,
            width=width,
            seed=layer,
            selection=selection,
            **combined,
        )
        router = random_router(
            kind, experts, checkpoint.hidden_size, seed=layer, scale=scale, **combined
        )
        if selection == "threshold":
            router = replace(router, threshold_slope=5.0)
        conversions.append((layout, router if experts else None))
    return conversions


def random_compensation(
    intermediate_size: int, hidden_size: int, experts: int, *, seed: int = 0
) -> Compensation:
    """A compensation with all three tensors."""
    generator = torch.Generator().manual_seed(seed)
    return Compensation(
        down_FD=0.1 * torch.randn(intermediate_size, hidden_size, generator=generator),
        output_bias_D=torch.randn(hidden_size, generator=generator),
        expert_bias_ED=torch.randn(experts, hidden_size, generator=generator),
    )


def shapes_of(
    checkpoint: Checkpoint,
    conversions: Sequence[Conversion],
    compensations: Sequence[Compensation] | None = None,
) -> list[LayerShape]:
    """Shape of every converted FFN."""
    return [
        converted_shape(
            checkpoint.ffn(layer, checkpoint.dtype), layout, router, _of_layer(compensations, layer)
        )
        for layer, (layout, router) in enumerate(conversions)
    ]


def account_of(
    checkpoint: Checkpoint,
    conversions: Sequence[Conversion],
    compensations: Sequence[Compensation] | None = None,
) -> ModelAccount:
    """The account of a converted model."""
    weights = checkpoint.ffn(0, checkpoint.dtype)
    return ModelAccount(
        hidden_size=checkpoint.hidden_size,
        intermediate_size=checkpoint.intermediate_size,
        total_dense_parameters=checkpoint.total_parameters(),
        layers=shapes_of(checkpoint, conversions, compensations),
        dense_gate_bias=weights.gate_bias_F is not None,
        dense_up_bias=weights.up_bias_F is not None,
        dense_output_bias=weights.output_bias_D is not None,
    )


def write_converted(
    checkpoint: Checkpoint,
    folder: Path,
    conversions: Sequence[Conversion],
    *,
    dtype: torch.dtype = torch.float32,
    limit: int = 10**9,
    compensations: Sequence[Compensation] | None = None,
) -> Path:
    """Write the converted model as ``assemble`` does: weights in shards, config."""

    def ffn_tensors(layer: int) -> dict[str, Tensor]:
        weights = checkpoint.ffn(layer, dtype)
        return converted_tensors(weights, *conversions[layer], _of_layer(compensations, layer))

    shapes = shapes_of(checkpoint, conversions, compensations)
    parts = converted_parts(checkpoint, shapes, ffn_tensors, dtype)
    write_shards(folder, parts, limit, lambda _name: None)
    config = converted_config(checkpoint.config, checkpoint.layer_shapes(shapes), {"seed": 0})
    config.dtype = dtype
    config.save_pretrained(folder)
    return folder


def load_converted(folder: Path) -> PreTrainedModel:
    """The converted model through transformers' own path, in the dtype it is stored in."""
    register()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


def ffns_of(model: nn.Module) -> list[MoEFeedForward]:
    """The converted FFN of every decoder layer."""
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


def _of_layer(compensations: Sequence[Compensation] | None, layer: int) -> Compensation | None:
    return None if compensations is None else compensations[layer]
