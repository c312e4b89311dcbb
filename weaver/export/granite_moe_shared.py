"""The stock architecture ``granitemoeshared``: runs in transformers and vLLM without own code.

A token's experts are the K largest of ``x W^T``; their outputs are summed with the weights
``softmax(selected logits)``. With W scaled by a power of two so small that every exponential is 1,
each weight is 1/K, and a down projection times K gives the unweighted sum. The selection is that of
the unscaled router, bit for bit: a power of two changes no order. Layers with softmax weights are
what the architecture computes: their routers stay as they are, and a down projection times c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GraniteMoeSharedConfig

from weaver.export.attention import (
    decoder_obstacles,
    decoder_values,
    has_output_projection_bias,
    has_qk_norm,
    head_dim,
    layer_rest,
    outer_part,
    rest_sizes,
    sizes,
)
from weaver.export.base import Obstacle, Source, StockModel, Target
from weaver.export.features import ffn_obstacles
from weaver.models.accounting import LayerShape
from weaver.models.converted_folder import ConvertedCheckpoint
from weaver.models.writing import Part

# exp(2^-40 * dz) is 1 in float32 for all logits that a router gives.
ROUTER_SCALE = 2.0**-40


def obstacles(checkpoint: ConvertedCheckpoint, dtype: torch.dtype) -> list[Obstacle]:
    """List the model's features that ``granitemoeshared`` cannot hold in ``dtype``."""
    found = decoder_obstacles(checkpoint)
    if found and found[0].approximation is None:
        return found
    other = "--to glm4-moe"
    if has_qk_norm(checkpoint.config):
        found.append(Obstacle("norms of queries and keys", "the target has none", other))
    shapes = {
        (s.num_shared_neurons, s.n_routed_experts, s.moe_intermediate_size, s.num_experts_per_tok)
        for s in checkpoint.shapes
    }
    if len(shapes) > 1:
        what = f"{len(shapes)} different splits of layers"
        found.append(Obstacle(what, "the target has one shape for all layers", other))
    factors = sorted({_factor(shape) for shape in checkpoint.shapes if shape.router_kind})
    if dtype is not torch.float32 and any(math.frexp(factor)[0] != 0.5 for factor in factors):
        times = ", ".join(f"{factor:g}" for factor in factors)
        found.append(
            Obstacle(
                f"down projections times {times} in 16 bits",
                "products with what is no power of two are rounded once more",
                f"--dtype float32, or {other}",
                approximation="rounded down projections",
            )
        )
    return found + ffn_obstacles(checkpoint, dtype, intercepts=False, softmax=True)


def _factor(shape: LayerShape) -> float:
    """By which the runtime's weights, whose sum is 1, differ from the model's."""
    if shape.weighting == "softmax":
        return shape.routed_scaling
    return float(shape.num_experts_per_tok)


def _scale(shape: LayerShape) -> float:
    return 1.0 if shape.weighting == "softmax" else ROUTER_SCALE


def build(source: Source) -> StockModel:
    """The model as ``granitemoeshared``.

    Raises:
        ValueError: a layer has what the architecture cannot hold.
    """
    checkpoint = source.checkpoint
    parts = [
        outer_part(checkpoint, source.dtype, tied=_tied(checkpoint)),
        *(_part(source, layer) for layer in range(checkpoint.num_layers)),
    ]
    experts = [list(range(shape.n_routed_experts)) for shape in checkpoint.shapes]
    facts: dict[str, object] = {"router_scale": [_scale(shape) for shape in checkpoint.shapes]}
    return StockModel(_config(source), parts, experts, "block_sparse_moe.router", facts)


def _tied(checkpoint: ConvertedCheckpoint) -> bool:
    return bool(getattr(checkpoint.config, "tie_word_embeddings", False))


def _config(source: Source) -> GraniteMoeSharedConfig:
    config, shape = source.checkpoint.config, source.checkpoint.shapes[0]
    return GraniteMoeSharedConfig(
        **decoder_values(config),
        tie_word_embeddings=_tied(source.checkpoint),
        intermediate_size=shape.moe_intermediate_size,
        shared_intermediate_size=shape.num_shared_neurons,
        num_local_experts=shape.n_routed_experts,
        num_experts_per_tok=shape.num_experts_per_tok,
        attention_multiplier=head_dim(config) ** -0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        architectures=["GraniteMoeSharedForCausalLM"],
        dtype=source.dtype,
    )


def _part(source: Source, layer: int) -> Part:
    checkpoint, dtype = source.checkpoint, source.dtype
    config, shape = checkpoint.config, checkpoint.shapes[layer]
    prefix = f"model.layers.{layer}."
    hidden, experts = config.hidden_size, shape.n_routed_experts
    width, shared = shape.moe_intermediate_size, shape.num_shared_neurons
    shapes: dict[str, Sequence[int]] = {
        "block_sparse_moe.router.layer.weight": (experts, hidden),
        "block_sparse_moe.input_linear.weight": (experts, 2 * width, hidden),
        "block_sparse_moe.output_linear.weight": (experts, hidden, width),
    }
    if shared:
        shapes |= {
            "shared_mlp.input_linear.weight": (2 * shared, hidden),
            "shared_mlp.output_linear.weight": (hidden, shared),
        }
    if _lacks_output_bias(checkpoint):
        shapes["self_attn.o_proj.bias"] = (hidden,)
    byte_sizes = {f"{prefix}{name}": size for name, size in sizes(shapes, dtype).items()}

    def load() -> dict[str, Tensor]:
        tensors = _ffn(source, layer)
        if _lacks_output_bias(checkpoint):
            tensors["self_attn.o_proj.bias"] = torch.zeros(hidden)
        own = {f"{prefix}{k}": v.to(dtype).contiguous() for k, v in tensors.items()}
        return layer_rest(checkpoint, layer, dtype) | own

    return Part(rest_sizes(checkpoint, layer, dtype) | byte_sizes, load)


def _lacks_output_bias(checkpoint: ConvertedCheckpoint) -> bool:
    """Biases of queries, keys and values come with one of the output projection: zeros."""
    config = checkpoint.config
    return bool(decoder_values(config)["attention_bias"]) and not has_output_projection_bias(config)


def _ffn(source: Source, layer: int) -> dict[str, Tensor]:
    """The tensors of one MoE block and shared expert, without the prefix of the layer."""
    converted = source.layer(layer)
    weights, router, shape = converted.weights, converted.router, converted.shape
    if router is None or router.kind != "linear" or router.bias_E is not None:
        raise ValueError(f"layer {layer} has no linear router without intercept")
    experts, shared = shape.n_routed_experts, shape.num_shared_neurons
    gate_EN, up_EN, down_EN = (
        rows_FD[shared:].unflatten(0, (experts, -1))
        for rows_FD in (weights.gate_FD, weights.up_FD, weights.down_FD)
    )
    share = torch.tensor(1.0 / _factor(shape))
    if shape.weighting == "unit":
        # The weight 1/K as the runtime has it, so that rounding it in bfloat16 cancels.
        share = share.to(source.dtype).float()
    tensors = {
        "block_sparse_moe.router.layer.weight": router.weight_ED.float() * _scale(shape),
        "block_sparse_moe.input_linear.weight": torch.cat([gate_EN, up_EN], dim=1),
        "block_sparse_moe.output_linear.weight": (down_EN.float() / share).transpose(1, 2),
    }
    if shared:
        both = [weights.gate_FD[:shared], weights.up_FD[:shared]]
        tensors["shared_mlp.input_linear.weight"] = torch.cat(both)
        tensors["shared_mlp.output_linear.weight"] = weights.down_FD[:shared].T
    return tensors


TARGET = Target(
    name="granite-moe-shared",
    summary="transformers without own code, vLLM; a linear router without intercept, equal layers",
    obstacles=obstacles,
    build=build,
    softmax=True,
)
