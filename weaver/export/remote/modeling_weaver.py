"""A language model whose feed-forward layers weaver split into experts, without weaver.

This file and ``pacing.py`` beside it need torch and transformers only:
``from_pretrained(..., trust_remote_code=True)`` finds them through ``auto_map`` in ``config.json``.
They are the plain definition. Where weaver is imported, its own classes load the same checkpoint
and compute the same with faster kernels.

For every family of transformers there are ``Weaver<Family>Config``, ``Weaver<Family>Model`` and
``Weaver<Family>ForCausalLM``, made when they are asked for: the family's own classes with other
feed-forward layers. ``config.weaver["layers"]`` holds the shape of each; where the model was a
Mixture of Experts before, those of its experts, each of which was split.

Shapes: T tokens, D hidden size, S shared neurons, E routed experts, N neurons per expert, F all
S + E * N neurons, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .pacing import PacedLayer, Pacer, pace

# What these families call the shared expert of a layer.
SHARED = {"qwen2_moe": "shared_expert", "glm4_moe": "shared_experts"}
# The others name the activation of their feed-forward layers in ``hidden_act``.
HIDDEN_ACTIVATION = ("gemma2", "gemma3_text")


class Router(nn.Module):
    """Chooses experts: logits ``s = x weight^T + bias``, or ``|(x up^T) * act(x weight^T)|``.

    The K largest of ``softmax(s) + balance_bias`` are selected ("top-k"), or all with
    ``s + balance_bias > lowest`` ("threshold", see ``pacing.py``). With ``p = softmax(s)`` the
    factor of an expert's output is ``1 + p_e * scale_e`` ("unit") or
    ``c * p_e / sum_selected p`` ("softmax", the denominator without a gradient). All of it is
    computed in float32.
    """

    def __init__(self, shape: dict[str, Any], hidden_size: int, act: nn.Module, std: float) -> None:
        super().__init__()
        experts = shape["n_routed_experts"]
        self.top_k = shape["num_experts_per_tok"]
        self.selection = shape.get("selection", "top-k")
        self.weighting = shape.get("weighting", "unit")
        self.routed_scaling = shape.get("routed_scaling", 1.0)
        self.act = act
        self.weight = _matrix(experts, hidden_size, std)
        self.up_weight = _matrix(experts, hidden_size, std) if _is_glu(shape) else None
        self.bias = _zeros(shape.get("router_bias"), experts)
        self.scale = nn.Parameter(torch.zeros(experts))
        # Not a buffer: some runtimes load parameters only.
        self.balance_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)

    def forward(self, x_TD: Tensor, lowest_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Expert ids and factors, (T, K); (T, E) for a threshold, the id E standing for none."""
        x_TD = x_TD.float()
        bias = None if self.bias is None else self.bias.float()
        scores_TE = functional.linear(x_TD, self.weight.float(), bias)
        if self.up_weight is not None:
            up_TE = functional.linear(x_TD, self.up_weight.float())
            scores_TE = (up_TE * self.act(scores_TE)).abs()
        probabilities_TE = scores_TE.softmax(dim=-1)
        factors_TE = 1.0 + probabilities_TE * self.scale.float()
        balance_bias_E = self.balance_bias.float()
        if self.selection == "top-k":
            ids_TK = (probabilities_TE + balance_bias_E).topk(self.top_k, dim=-1).indices
            if self.weighting == "softmax":
                chosen_TK = scores_TE.log_softmax(dim=-1).gather(1, ids_TK)
                total_T1 = chosen_TK.detach().logsumexp(dim=-1, keepdim=True)
                return ids_TK, self.routed_scaling * (chosen_TK - total_T1).exp()
            return ids_TK, factors_TE.gather(1, ids_TK)
        experts = scores_TE.shape[1]
        ids_E = torch.arange(experts, device=x_TD.device)
        lowest = 0.0 if lowest_T is None else lowest_T[:, None]
        return torch.where(scores_TE + balance_bias_E > lowest, ids_E, experts), factors_TE


class MoEFeedForward(nn.Module):
    """Shared and routed experts as row slices of three matrices, and their router.

    ``y = shared(x) + sum_{e selected by x} w_e (expert_e(x) + b_e) + output_bias``

    Row j of ``gate_weight``, ``up_weight`` and ``down_weight`` (all (F, D)) is neuron j: S shared
    neurons first, then N per expert. Row e of ``expert_bias`` (E, D) is ``b_e``.
    """

    def __init__(self, shape: dict[str, Any], hidden_size: int, act: nn.Module, std: float) -> None:
        super().__init__()
        self.num_shared = shape["num_shared_neurons"]
        self.num_experts = shape["n_routed_experts"]
        self.width = shape["moe_intermediate_size"]
        self.act = act
        neurons = self.num_shared + self.num_experts * self.width
        self.gate_weight = _matrix(neurons, hidden_size, std)
        self.up_weight = _matrix(neurons, hidden_size, std)
        self.down_weight = _matrix(neurons, hidden_size, std)
        self.gate_bias = _zeros(shape.get("gate_bias"), neurons)
        self.up_bias = _zeros(shape.get("up_bias"), neurons)
        self.output_bias = _zeros(shape.get("output_bias"), hidden_size)
        self.expert_bias = _zeros(shape.get("expert_bias"), self.num_experts, hidden_size)
        routed = shape.get("router_kind") is not None
        self.router = Router(shape, hidden_size, act, std) if routed else None
        self.pace: tuple[Pacer, int] | None = None

    @property
    def experts(self) -> RoutedExperts | None:
        """The routed experts alone; None if the layer has none."""
        return None if self.router is None else RoutedExperts(self)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TD = self._hidden(x_TD, 0, self.num_shared) @ self.down_weight[: self.num_shared]
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias
        if self.router is not None:
            y_TD = self.add_experts(y_TD, x_TD, *self.routed(x_TD))
        return y_TD.view_as(hidden_states)

    def routed(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice, at the pace of the sequences that the tokens are of."""
        assert self.router is not None
        if self.pace is None:
            choice: tuple[Tensor, Tensor] = self.router(x_TD)
            return choice
        pacer, index = self.pace
        lowest_T = pacer.lowest(index, len(x_TD))
        lowest_T = None if lowest_T is None else lowest_T.to(x_TD.device)
        ids_TK, factors_TK = self.router(x_TD, lowest_T)
        pacer.record(index, (ids_TK < self.num_experts).sum(1))
        return ids_TK, factors_TK

    def add_experts(self, y_TD: Tensor, x_TD: Tensor, ids_TK: Tensor, factors_TK: Tensor) -> Tensor:
        """``y`` and the weighted outputs of the chosen experts, summed in at least float32."""
        total_TD = y_TD.to(torch.promote_types(y_TD.dtype, torch.float32), copy=True)
        none_TE = torch.zeros(x_TD.shape[0], self.num_experts + 1, device=x_TD.device)
        factors_TE = none_TE.scatter(1, ids_TK.long(), factors_TK.float())[:, : self.num_experts]
        if self.expert_bias is not None:
            total_TD.addmm_(factors_TE.to(total_TD.dtype), self.expert_bias.to(total_TD.dtype))
        if torch.compiler.is_compiling():
            # In a graph no shape may depend on values: all experts, most of them times zero.
            total_TD += self._all_experts(x_TD, factors_TE)
        else:
            self._add_chosen(total_TD, x_TD, ids_TK, factors_TE)
        return total_TD.to(y_TD.dtype)

    def _add_chosen(
        self, total_TD: Tensor, x_TD: Tensor, ids_TK: Tensor, factors_TE: Tensor
    ) -> None:
        for expert in ids_TK.unique().tolist():
            if expert == self.num_experts:
                continue
            begin = self.num_shared + expert * self.width
            end = begin + self.width
            tokens_P = (ids_TK == expert).any(dim=1).nonzero().squeeze(1)
            out_PD = self._hidden(x_TD[tokens_P], begin, end) @ self.down_weight[begin:end]
            factors_P1 = factors_TE[tokens_P, expert, None]
            total_TD.index_add_(0, tokens_P, out_PD.to(total_TD.dtype) * factors_P1)

    def _all_experts(self, x_TD: Tensor, factors_TE: Tensor) -> Tensor:
        hidden_TF = self._hidden(x_TD, self.num_shared, len(self.gate_weight))
        factors_TF = factors_TE.to(x_TD.dtype).repeat_interleave(self.width, dim=1)
        return (hidden_TF * factors_TF) @ self.down_weight[self.num_shared :]

    def _hidden(self, x_TD: Tensor, begin: int, end: int) -> Tensor:
        """Neurons ``begin:end``: ``act(x gate^T + gate_bias) * (x up^T + up_bias)``."""
        rows = slice(begin, end)
        gate_bias = None if self.gate_bias is None else self.gate_bias[rows]
        up_bias = None if self.up_bias is None else self.up_bias[rows]
        gate = self.act(functional.linear(x_TD, self.gate_weight[rows], gate_bias))
        hidden: Tensor = gate * functional.linear(x_TD, self.up_weight[rows], up_bias)
        return hidden


class RoutedExperts:
    """The routed experts of a layer, with the interface of transformers' MoE models.

    A view: an expert is rows of the layer's matrices and has no tensors of its own.
    """

    def __init__(self, layer: MoEFeedForward) -> None:
        self._layer = layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``sum_k w_k (expert_k(x) + b_k)`` in the shape of the inputs.

        Args:
            hidden_states: inputs of T tokens, (..., D).
            top_k_index: expert ids, no id twice for a token; E stands for none, (T, K).
            top_k_weights: factors of the experts' outputs, (T, K).
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        nothing_TD = torch.zeros_like(x_TD)
        y_TD = self._layer.add_experts(nothing_TD, x_TD, top_k_index, top_k_weights)
        return y_TD.view_as(hidden_states)

    __call__ = forward


class ExpertList(nn.ModuleList):
    """The experts of a layer of two levels: a feed-forward module each."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``sum_k w_k expert_k(x)`` in the shape of the inputs, summed in at least float32.

        Args:
            hidden_states: inputs of T tokens, (..., D).
            top_k_index: expert ids, no id twice for a token; E stands for none, (T, K).
            top_k_weights: factors of the experts' outputs, (T, K).
        """
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        total_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for expert, module in enumerate(self):
            tokens_P, slots_P = (top_k_index == expert).nonzero(as_tuple=True)
            if tokens_P.numel():
                factors_P1 = top_k_weights[tokens_P, slots_P, None].to(total_TD.dtype)
                out_PD = module(x_TD[tokens_P]).to(total_TD.dtype)
                total_TD.index_add_(0, tokens_P, out_PD * factors_P1)
        return total_TD.to(x_TD.dtype).view_as(hidden_states)


class TwoLevelFeedForward(nn.Module):
    """A layer that weaver split twice: ``shared(x) + sum_e w_e expert_e(x) + output_bias``."""

    def __init__(self, shape: dict[str, Any], hidden_size: int, act: nn.Module, std: float) -> None:
        super().__init__()
        self.router = Router(shape, hidden_size, act, std)
        self.output_bias = _zeros(shape.get("output_bias"), hidden_size)
        self.experts = ExpertList()
        self.shared: nn.Module | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        y_TD: Tensor = self.experts(x_TD, *self.router(x_TD))
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias
        return y_TD.view_as(hidden_states)


def _split_experts(layer: nn.Module, entry: dict[str, Any], shared: str, *rest: Any) -> None:
    """Put split experts into a layer; ``rest`` is what a feed-forward module takes besides."""
    if entry["outer"] is not None:
        layer.mlp = TwoLevelFeedForward(entry["outer"], *rest)
    block: Any = layer.mlp
    block.experts = ExpertList([MoEFeedForward(shape, *rest) for shape in entry["experts"]])
    if entry["shared"] is not None:
        setattr(block, shared, MoEFeedForward(entry["shared"], *rest))


def _paced(shape: dict[str, Any]) -> PacedLayer:
    experts = float(shape["num_experts_per_tok"])
    return PacedLayer(
        shape["late_experts"] or experts,
        shape["early_experts"] or experts,
        shape["moe_intermediate_size"],
        shape["threshold_slope"],
    )


def _is_glu(shape: dict[str, Any]) -> bool:
    return bool(shape["router_kind"] == "glu")


def _matrix(rows: int, columns: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).normal_(0.0, std))


def _zeros(present: bool | None, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(*shape)) if present else None


def _config_class(dense: Any) -> type:
    class Config(dense):  # type: ignore[misc]
        model_type = f"weaver_{dense.model_type}"
        # The feed-forward layers have no gate_proj, up_proj or down_proj to shard by name.
        base_model_tp_plan = None
        base_model_ep_plan = None

    return Config


def _model_class(dense: Any) -> type:
    field = (
        "hidden_activation" if dense.config_class.model_type in HIDDEN_ACTIVATION else "hidden_act"
    )

    shared = SHARED.get(dense.config_class.model_type, "shared")

    class Model(dense):  # type: ignore[misc]
        config_class = __getattr__(f"Weaver{dense.config_class.__name__}")

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            layers, shapes = self.base_model.layers, config.weaver["layers"]
            paced: list[tuple[MoEFeedForward, PacedLayer]] = []
            for layer, shape in zip(layers, shapes, strict=True):
                act = ACT2FN[getattr(config, field)]
                std = config.initializer_range
                if "experts" in shape:
                    _split_experts(layer, shape, shared, config.hidden_size, act, std)
                else:
                    layer.mlp = MoEFeedForward(shape, config.hidden_size, act, std)
                    if shape.get("selection") == "threshold":
                        paced.append((layer.mlp, _paced(shape)))
            places = (config.weaver.get(name, 0) for name in ("first_tokens", "early_tokens"))
            pace(self.base_model, paced, *places)

    return Model


def __getattr__(name: str) -> type:
    """``WeaverLlamaConfig`` and the like, from transformers' class without "Weaver"."""
    if name in globals():
        return globals()[name]  # type: ignore[no-any-return]
    if not name.startswith("Weaver"):
        raise AttributeError(name)
    dense = getattr(transformers, name.removeprefix("Weaver"))
    cls = _config_class(dense) if name.endswith("Config") else _model_class(dense)
    cls.__name__ = cls.__qualname__ = name
    cls.__module__ = __name__
    globals()[name] = cls
    return cls
