"""Features of a converted FFN that a stock one may lack, and the nearest stock layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from weaver.algorithms.ridge import ridge_fit
from weaver.artifacts.types import Router
from weaver.export.base import Obstacle
from weaver.kernels.reference import ExpertChoice, route, router_logits
from weaver.models.converted_folder import ConvertedCheckpoint, ConvertedLayer

# Of the regression that replaces a GLU router, see ``ridge_fit``.
_PENALTY = 0.1
_OWN = "--to weaver"
_REBUILD = "rebuild the router: weaver build-router --router ridge"


def ffn_obstacles(
    checkpoint: ConvertedCheckpoint,
    dtype: torch.dtype,
    *,
    intercepts: bool,
    softmax: bool = False,
) -> list[Obstacle]:
    """List the FFN features that a target with linear top-k routers and no constants lacks.

    Args:
        checkpoint: the converted model.
        dtype: of the exported weights.
        intercepts: whether the target has a bias that only selects.
        softmax: whether the target weights the chosen experts by the softmax of their logits.
    """
    shapes = checkpoint.shapes
    if all(shape.router_kind is None for shape in shapes):
        what = "a static model: no layer has routed experts"
        return [Obstacle(what, "the target is a Mixture-of-Experts model", _OWN)]
    found = [_NARROW] if dtype is torch.float16 else []
    if any(shape.router_kind == "glu" for shape in shapes):
        fit = "a linear router fitted to its scores"
        found.append(
            Obstacle(
                "a GLU router",
                "stock routers are one linear map",
                _REBUILD if intercepts else _OWN,
                fit if intercepts else None,
            )
        )
    if any(shape.selection == "threshold" for shape in shapes):
        found.append(_THRESHOLD)
    if any(shape.expert_bias for shape in shapes):
        found.append(_CONSTANTS)
    elif any(shape.output_bias for shape in shapes):
        what = "a bias of the FFN's output"
        found.append(Obstacle(what, "stock experts have none", _OWN, "no output bias"))
    if any(shape.gate_bias or shape.up_bias for shape in shapes):
        what = "biases of the gate or up projection"
        found.append(Obstacle(what, "stock experts have none", _OWN))
    if checkpoint.was_trained("router.balance_bias"):
        found.append(_BALANCE if intercepts else replace(_BALANCE, approximation=None))
    if checkpoint.was_trained("router.scale"):
        found.append(_FACTORS)
    if not softmax and not all(shape.sums_experts for shape in shapes):
        found.append(_WEIGHTS)
    if any(shape.router_bias for shape in shapes) and not intercepts:
        found.append(Obstacle("router intercepts", "the target's router has none", "--to glm4-moe"))
    return found


_NARROW = Obstacle(
    "float16 weights",
    "router rows times a small power of two lose digits in them, or become zero",
    "--dtype bfloat16, or --dtype float32",
)
_THRESHOLD = Obstacle(
    "selection by threshold",
    "stock routers select the same number of experts for every token",
    "split again: weaver partition --set partition.options.selection=top-k",
    "exactly K experts for every token, K the mean that the threshold was set to",
)
_CONSTANTS = Obstacle(
    "constants that stand in for skipped experts",
    "a stock expert adds no constant",
    "build without them: weaver build-router --set router.constants=false",
    "the experts without their constants",
)
_BALANCE = Obstacle(
    "balance biases, which add to probabilities",
    "the target selects by logits",
    _OWN,
    "the biases divided by the probability of the last expert selected",
)
_FACTORS = Obstacle(
    "trained output factors 1 + softmax(s) * scale",
    "the target sums experts with weight 1",
    _OWN,
    "each expert times its mean factor",
)
_WEIGHTS = Obstacle(
    "softmax weights of the chosen experts",
    "the target sums experts with weight 1",
    _OWN,
    "each expert times its mean factor",
)


def approximated(layer: ConvertedLayer, x_TD: Tensor, *, softmax: bool = False) -> ConvertedLayer:
    """The nearest layer with a linear top-k router, factors of 1 and no constants.

    GLU scores are fitted by ``sqrt(s) ~ x W^T + b`` (ridge regression). A balance bias ``c``, which
    adds to probabilities, becomes ``c / p`` on the logits, with p the mean probability of the K-th
    expert (``ds = dp / p``). An expert's factors (trained ones, softmax weights) become their mean
    over the tokens that select it, in its rows of the down projection.

    Args:
        layer: a converted FFN.
        x_TD: FFN inputs of the calibration text, (T, D).
        softmax: the target has softmax weights, which are left as they are.
    """
    router, shape = layer.router, layer.shape
    bare = replace(layer.weights, output_bias_D=None)
    if router is None:
        return replace(layer, weights=bare)
    x_TD, activation = x_TD.float(), layer.weights.activation
    routing = route(
        x_TD, router, activation, ExpertChoice(shape.num_experts_per_tok, shape.selection)
    )
    sums_E = torch.zeros(shape.n_routed_experts).index_add_(
        0, routing.experts_P, routing.weights_P.float()
    )
    factors_E = torch.where(
        routing.counts_E() > 0, sums_E / routing.counts_E().clamp_min(1), torch.ones(())
    )
    weighted = softmax and shape.weighting == "softmax"
    scores_TE = router_logits(x_TD, router, activation)
    weight_ED, bias_E = router.weight_ED.float(), router.bias_E
    if router.kind == "glu":
        weight_ED, bias_E = ridge_fit(x_TD, scores_TE.sqrt(), _PENALTY)
    elif bool(router.balance_bias_E.any()):
        added_E = router.balance_bias_E.float()
        if shape.selection == "top-k":
            top_TK = scores_TE.softmax(-1).topk(shape.num_experts_per_tok).values
            added_E = added_E / top_TK[:, -1].mean()
        bias_E = added_E if bias_E is None else bias_E.float() + added_E
    zeros_E = torch.zeros(shape.n_routed_experts)
    linear = Router("linear", weight_ED, zeros_E, zeros_E, bias_E=bias_E)
    if weighted:
        linear = replace(linear, weighting="softmax", routed_scaling=shape.routed_scaling)
    plain = replace(
        shape,
        router_kind="linear",
        router_bias=bias_E is not None,
        selection="top-k",
        expert_bias=False,
        output_bias=False,
        weighting=linear.weighting,
        routed_scaling=linear.routed_scaling,
    )
    down_FD = layer.weights.down_FD if weighted else _scaled(layer, factors_E)
    return ConvertedLayer(plain, replace(bare, down_FD=down_FD), linear)


def _scaled(layer: ConvertedLayer, factors_E: Tensor) -> Tensor:
    """The down projection with every expert's rows times its factor."""
    if bool((factors_E == 1).all()):
        return layer.weights.down_FD
    down_FD, shape = layer.weights.down_FD.clone(), layer.shape
    factors_F = factors_E.repeat_interleave(shape.moe_intermediate_size)[:, None]
    down_FD[shape.num_shared_neurons :] *= factors_F.to(down_FD.dtype)
    return down_FD
