"""The stock architecture ``glm4_moe``: runs in transformers, vLLM and SGLang without own code.

A token's experts are the K largest of ``sigmoid(x W^T) + c``; their outputs are summed with the
weights ``K * sigmoid(x W^T)_e / sum_selected sigmoid(x W^T)``. With W scaled by a small power of
two these weights are 1 + O(logit / 2), the sigmoid is ``1/2 + logit / 4``, and so the selection is
that of a linear router with the intercept ``4 c``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Glm4MoeConfig

from weaver.artifacts.types import Router
from weaver.export.attention import (
    decoder_obstacles,
    decoder_values,
    has_output_projection_bias,
    has_qk_norm,
    layer_rest,
    outer_part,
    rest_sizes,
    sizes,
)
from weaver.export.base import ALWAYS, NEVER, Obstacle, Source, StockModel, Target
from weaver.export.features import ffn_obstacles
from weaver.export.placement import Placement, blocks, padded, per_expert, place
from weaver.kernels.reference import router_logits
from weaver.models.converted_folder import ConvertedCheckpoint
from weaver.models.writing import Part

# Standard deviation of the scaled logits of a token. Larger, and the sum is no longer unweighted;
# much smaller, and float32 cannot tell scores of 1/2 + logit / 4 apart.
LOGIT_SPREAD = 2e-3
# Added to the scores in (0, 1) of experts that every token selects, or none.
FORCED = 16.0
# With 8 slices one token in a thousand gets another expert; with 16 and more, two nearly equal
# experts are confused so often that it shows (docs/LOG.md, docs/serving_checks.md).
MOST_EXACT = 8
_BIAS = "e_score_correction_bias"


def obstacles(checkpoint: ConvertedCheckpoint, dtype: torch.dtype) -> list[Obstacle]:
    """List the model's features that ``glm4_moe`` cannot hold in ``dtype``."""
    found = decoder_obstacles(checkpoint)
    if found and found[0].approximation is None:
        return found
    if has_output_projection_bias(checkpoint.config):
        found.append(
            Obstacle(
                "a bias of the attention's output projection",
                "the target has none",
                "--to granite-moe-shared, or --to weaver",
            )
        )
    found += ffn_obstacles(checkpoint, dtype, intercepts=True)
    most = max(shape.n_routed_experts for shape in checkpoint.shapes)
    if most > MOST_EXACT:
        found.append(_near_ties(most))
    return found


def _near_ties(experts: int) -> Obstacle:
    return Obstacle(
        f"{experts} routed experts in a layer",
        "its scores are sigmoids of small logits in float32, which decide near ties among more "
        f"than {MOST_EXACT} experts otherwise",
        "fewer slices: weaver partition --num-experts 8; or --to weaver",
        "now and then another one of two nearly equal experts",
    )


def build(source: Source) -> StockModel:
    """The model as ``glm4_moe``.

    Raises:
        ValueError: a layer has what the architecture cannot hold.
    """
    checkpoint = source.checkpoint
    placement = place(checkpoint.shapes)
    scales = [_scale(source, i) for i in range(checkpoint.num_layers)]
    parts = [
        outer_part(checkpoint, source.dtype, tied=False),
        *(_part(source, placement, i, scale) for i, scale in enumerate(scales)),
    ]
    experts = [[slot.expert for slot in layer] for layer in placement.layers]
    facts = {
        "router_scale": scales,
        "always_selected": [slots.count(ALWAYS) for slots in experts],
        "never_selected": [slots.count(NEVER) for slots in experts],
    }
    return StockModel(_config(source, placement), parts, experts, "mlp.gate", facts)


def router_scale(logits_TE: Tensor) -> float:
    """The largest power of two that keeps a token's logits within ``LOGIT_SPREAD``.

    ``2^floor(log2(LOGIT_SPREAD / sd))``, sd the standard deviation over the experts of a token, its
    root mean square over tokens; 1 at most.
    """
    if logits_TE.shape[1] < 2:
        return 2.0**-10
    spread = float(logits_TE.var(dim=1).mean().sqrt())
    return 2.0 ** min(0, math.floor(math.log2(LOGIT_SPREAD / max(spread, 1e-30))))


def _scale(source: Source, layer: int) -> float:
    router = source.layer(layer).router
    if router is None:
        return 1.0
    return router_scale(router_logits(source.inputs(layer), router, "silu"))


def _config(source: Source, placement: Placement) -> Glm4MoeConfig:
    dense = source.checkpoint.config
    values = decoder_values(dense)
    # Without it half of every head would be rotated.
    values["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    values |= {
        "partial_rotary_factor": 1.0,
        "use_qk_norm": has_qk_norm(dense),
        "tie_word_embeddings": False,
        "intermediate_size": placement.padded_neurons,
        "moe_intermediate_size": placement.width,
        "n_shared_experts": placement.num_shared,
        "n_routed_experts": placement.num_routed,
        "num_experts_per_tok": placement.top_k,
        "norm_topk_prob": True,
        "routed_scaling_factor": float(placement.top_k),
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "num_nextn_predict_layers": 0,
        "architectures": ["Glm4MoeForCausalLM"],
        "dtype": source.dtype,
    }
    return Glm4MoeConfig(**values)


def _part(source: Source, placement: Placement, layer: int, scale: float) -> Part:
    checkpoint, dtype = source.checkpoint, source.dtype
    prefix = f"model.layers.{layer}.mlp."
    hidden, width = checkpoint.config.hidden_size, placement.width
    shared = placement.num_shared * width
    shapes: dict[str, Sequence[int]] = {"gate.weight": (placement.num_routed, hidden)}
    owners = [("shared_experts", shared)]
    owners += [(f"experts.{e}", width) for e in range(placement.num_routed)]
    for owner, neurons in owners:
        shapes |= {f"{owner}.{name}.weight": (neurons, hidden) for name in _PROJECTIONS}
    byte_sizes = {f"{prefix}{k}": v for k, v in sizes(shapes, dtype).items()}
    byte_sizes[f"{prefix}gate.{_BIAS}"] = placement.num_routed * torch.float32.itemsize

    def load() -> dict[str, Tensor]:
        tensors = {f"{prefix}{k}": v for k, v in _ffn(source, placement, layer, scale).items()}
        return layer_rest(checkpoint, layer, dtype) | tensors

    return Part(rest_sizes(checkpoint, layer, dtype) | byte_sizes, load)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _ffn(source: Source, placement: Placement, layer: int, scale: float) -> dict[str, Tensor]:
    """The tensors of one MoE block, without the prefix of the layer."""
    converted, experts = source.layer(layer), placement.layers[layer]
    weights, hidden = converted.weights, converted.weights.hidden_size
    if weights.output_bias_D is not None or converted.expert_bias_ED is not None:
        raise ValueError(f"layer {layer} has constants")
    shared = placement.shared_neurons(converted.shape)
    tensors: dict[str, Tensor] = {}
    matrices = (weights.gate_FD, weights.up_FD, weights.down_FD)
    for name, rows_FD in zip(_PROJECTIONS, matrices, strict=True):
        own = [("shared_experts", padded(rows_FD[:shared], placement.num_shared * placement.width))]
        slots = blocks(rows_FD, experts, placement.width)
        own += [(f"experts.{e}", block) for e, block in enumerate(slots)]
        for owner, rows_ND in own:
            stored = rows_ND.T if name == "down_proj" else rows_ND
            tensors[f"{owner}.{name}.weight"] = stored.to(source.dtype).contiguous()
    weight_ED, bias_E = torch.zeros(1, hidden), torch.zeros(1)
    if converted.router is not None:
        weight_ED, bias_E = _selection(converted.router, scale)
    # Experts that are always selected share the mean logit, and so the weight, of the others.
    placed_ED = per_expert(weight_ED, experts, weight_ED.mean(0))
    tensors["gate.weight"] = placed_ED.to(source.dtype)
    never = torch.tensor([expert.expert == NEVER for expert in experts])
    tensors[f"gate.{_BIAS}"] = per_expert(bias_E, experts, FORCED).masked_fill(never, -FORCED)
    return tensors


def _selection(router: Router, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled router rows and the selection bias of the same scale, in float32."""
    if router.kind != "linear" or bool(router.balance_bias_E.any()) or bool(router.scale_E.any()):
        raise ValueError("a router with more than a linear map and an intercept")
    weight_ED = router.weight_ED.float() * scale
    intercept_E = torch.zeros(weight_ED.shape[0]) if router.bias_E is None else router.bias_E
    # The sigmoid has the slope 1/4 at 0.
    return weight_ED, intercept_E.float() * scale / 4


TARGET = Target(
    name="glm4-moe",
    summary="transformers without own code, vLLM, SGLang; any linear router, any split per layer",
    obstacles=obstacles,
    build=build,
)
