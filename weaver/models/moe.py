"""The converted FFN as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.types import Compensation, ExpertLayout, Router
from weaver.kernels.backends import backend_for
from weaver.kernels.ops import choose_path, layer_forward, moe_forward, route_tokens
from weaver.kernels.reference import (
    ExpertChoice,
    MoELayer,
    Routing,
    route_to_all,
    router_logits,
)
from weaver.models.accounting import LayerShape
from weaver.models.pacing import PacedLayer, Pacer


class MoERouter(nn.Module):
    """Parameters of a router; see ``weaver.artifacts.types.Router``."""

    balance_bias: Tensor

    def __init__(self, shape: LayerShape, hidden_size: int, *, std: float) -> None:
        super().__init__()
        experts = shape.n_routed_experts
        self.weighting, self.routed_scaling = shape.weighting, shape.routed_scaling
        self.weight = _matrix(experts, hidden_size, std)
        self.scale = nn.Parameter(torch.zeros(experts))
        self.up_weight = _matrix(experts, hidden_size, std) if shape.router_kind == "glu" else None
        self.bias = _bias(experts if shape.router_bias else 0)
        self.register_buffer("balance_bias", torch.zeros(experts))

    def record(self) -> Router:
        """The router as the type that kernels take."""
        return Router(
            kind="linear" if self.up_weight is None else "glu",
            weight_ED=self.weight,
            scale_E=self.scale,
            balance_bias_E=self.balance_bias,
            up_weight_ED=self.up_weight,
            bias_E=self.bias,
            weighting=self.weighting,
            routed_scaling=self.routed_scaling,
        )

    def forward(self) -> Router:
        """``record`` as a call: goes through ``__call__`` so that FSDP hooks fire."""
        return self.record()


class MoEFeedForward(nn.Module):
    """Shared and routed experts as row slices of three matrices, and their router.

    ``y = shared(x) + sum_{e selected by x} w_e (expert_e(x) + b_e) + output_bias``

    Row j of ``gate_weight``, ``up_weight`` and ``down_weight`` (all (S + E * N, D)) is neuron j of
    the permuted FFN: S shared neurons first, then N per expert. Row e of ``expert_bias`` (E, D) is
    ``b_e``, where the layer has such constants. A static layer has no router. Weights start as
    N(0, std^2), biases, constants and router scales at zero.
    """

    def __init__(
        self, shape: LayerShape, hidden_size: int, activation: str, *, std: float = 0.02
    ) -> None:
        super().__init__()
        self.shape = shape
        self.activation = activation
        neurons = shape.total_neurons
        self.gate_weight = _matrix(neurons, hidden_size, std)
        self.up_weight = _matrix(neurons, hidden_size, std)
        self.down_weight = _matrix(neurons, hidden_size, std)
        self.gate_bias = _bias(neurons if shape.gate_bias else 0)
        self.up_bias = _bias(neurons if shape.up_bias else 0)
        self.output_bias = _bias(hidden_size if shape.output_bias else 0)
        self.expert_bias = _bias(shape.n_routed_experts if shape.expert_bias else 0, hidden_size)
        self.router = MoERouter(shape, hidden_size, std=std) if shape.router_kind else None
        # Set while a router is trained on all experts; see ``weaver.training.dense``.
        self.temperature: float | None = None
        # Who moves the threshold along a sequence, and this layer's index there.
        self.pace: tuple[Pacer, int] | None = None

    @classmethod
    def convert(
        cls,
        weights: GluWeights,
        layout: ExpertLayout,
        router: Router | None,
        compensation: Compensation | None = None,
    ) -> MoEFeedForward:
        """Build the module from a dense FFN and what was made for it, in the weights' dtype.

        Raises:
            ValueError: the compensation is not of the layout's or the FFN's shape.
        """
        tensors = converted_tensors(weights, layout, router, compensation)
        shape = converted_shape(weights, layout, router, compensation)
        with torch.device("meta"):
            module = cls(shape, weights.hidden_size, weights.activation)
        module.load_state_dict(tensors, assign=True)
        return module.requires_grad_(False)

    @property
    def num_routed_experts(self) -> int:
        return self.shape.n_routed_experts

    @property
    def top_k(self) -> int:
        """K; for a threshold the mean number of experts that the router is set to."""
        return self.shape.num_experts_per_tok

    @property
    def experts(self) -> RoutedExperts | None:
        """The routed experts alone, called as transformers calls experts; None if static."""
        return None if self.router is None else RoutedExperts(self)

    def weights(self) -> GluWeights:
        """The permuted FFN."""
        return GluWeights(
            gate_FD=self.gate_weight,
            up_FD=self.up_weight,
            down_FD=self.down_weight,
            activation=self.activation,
            gate_bias_F=self.gate_bias,
            up_bias_F=self.up_bias,
            output_bias_D=self.output_bias,
        )

    def layer(self) -> MoELayer:
        """The converted FFN as the kernels take it."""
        router = None if self.router is None else self.router()
        return MoELayer(self.weights(), self.shape.num_shared_neurons, self.expert_bias, router)

    def routing(self, x_TD: Tensor) -> Routing | None:
        """The experts of every token; None for a static layer."""
        if self.router is None:
            return None
        with torch.autocast(x_TD.device.type, enabled=False):
            return route_tokens(x_TD, self.layer(), self._choice(x_TD))

    def probabilities(self, x_TD: Tensor) -> Tensor:
        """``p = softmax(s)`` of the router, in float32, (T, E)."""
        assert self.router is not None, "a static layer routes nothing"
        with torch.autocast(x_TD.device.type, enabled=False):
            return router_logits(x_TD, self.router(), self.activation).softmax(dim=-1)

    def path(self, x_TD: Tensor, routing: Routing) -> str:
        """Name backend and path of these tokens: "native grouped", "torch masked", ..."""
        layer = self.layer()
        backend = backend_for(x_TD, layer, routing.weights_P)
        return f"{backend} {choose_path(layer, routing, backend)}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        # The kernels are chosen by what they cost and one of them is compiled here: torch.compile
        # takes what lies around them.
        if torch.compiler.is_compiling():
            return _outside_graphs(self, hidden_states)
        return self._compute(hidden_states)

    def _compute(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        device = x_TD.device.type
        if not torch.is_autocast_enabled(device):
            return self._ffn(x_TD, self.layer()).view_as(hidden_states)
        # The kernels take one dtype, and autocast knows nothing of them. Router scores stay in
        # float32, as they are in a model that is stored in 16 bits.
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            y_TD = self._ffn(x_TD.to(dtype), self.layer().to(dtype))
        return y_TD.view_as(hidden_states)

    def _ffn(self, x_TD: Tensor, layer: MoELayer) -> Tensor:
        if layer.router is None:
            return moe_forward(x_TD, layer, None)
        if self.temperature is not None:
            routing = route_to_all(x_TD, layer.router, self.activation, self.temperature)
            return moe_forward(x_TD, layer, routing)
        y_TD, counts_T = layer_forward(x_TD, layer, self._choice(x_TD))
        if self.pace is not None:
            pacer, index = self.pace
            pacer.record(index, counts_T)
        return y_TD

    def _choice(self, x_TD: Tensor) -> ExpertChoice:
        """Return the layer's rule, with the pacer's thresholds during its calls."""
        lowest_T = None
        if self.pace is not None:
            pacer, index = self.pace
            lowest_T = pacer.lowest(index, x_TD.shape[0])
        if lowest_T is not None:
            lowest_T = lowest_T.to(x_TD.device)
        return ExpertChoice(self.top_k, self.shape.selection, lowest_T)

    @property
    def paced(self) -> PacedLayer | None:
        """K, N and threshold slope for a pacer; None unless a threshold selects the experts."""
        shape = self.shape
        if shape.selection != "threshold":
            return None
        return PacedLayer(
            shape.late_experts or float(shape.num_experts_per_tok),
            shape.early_experts or float(shape.num_experts_per_tok),
            shape.moe_intermediate_size,
            shape.threshold_slope,
        )

    def extra_repr(self) -> str:
        s = self.shape
        return (
            f"shared={s.num_shared_neurons}, experts={s.n_routed_experts} x "
            f"{s.moe_intermediate_size}, top_k={s.num_experts_per_tok}, router={s.router_kind}, "
            f"selection={s.selection}, weighting={s.weighting}"
        )


_outside_graphs: Callable[[MoEFeedForward, Tensor], Tensor] = torch.compiler.disable(
    MoEFeedForward._compute
)


class RoutedExperts:
    """The routed experts of a layer, with the interface that transformers' MoE models have.

    ``y_t = sum_k w_tk (expert_e(x_t) + b_e)`` with ``e = i_tk``: without the router, the shared
    expert and the output bias. It holds nothing: an expert is rows of the layer's matrices, so that
    checkpoints need no names for it. A runtime that exchanges ``experts`` for fused experts of its
    own (vLLM) looks for a ``ModuleList`` or three-dimensional parameters of one shape; it does not
    find them here and runs the layer's own forward.
    """

    def __init__(self, layer: MoEFeedForward) -> None:
        self._layer = layer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, in the shape of the inputs.

        Args:
            hidden_states: FFN inputs of T tokens, (..., D).
            top_k_index: expert ids, no id twice for a token; E stands for none, (T, K).
            top_k_weights: factors of the experts' outputs, (T, K).
        """
        layer, experts = self._layer.layer(), self._layer.num_routed_experts
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = Routing.of_slots(top_k_index, top_k_weights, experts)
        routed = MoELayer(layer.routed(), 0, layer.expert_bias_ED)
        return moe_forward(x_TD, routed, routing).view_as(hidden_states)

    __call__ = forward


def converted_shape(
    weights: GluWeights,
    layout: ExpertLayout,
    router: Router | None,
    compensation: Compensation | None = None,
) -> LayerShape:
    """Shape of the converted FFN."""
    return LayerShape.of(
        layout,
        router,
        compensation,
        gate_bias=weights.gate_bias_F is not None,
        up_bias=weights.up_bias_F is not None,
        output_bias=weights.output_bias_D is not None,
    )


def converted_tensors(
    weights: GluWeights,
    layout: ExpertLayout,
    router: Router | None,
    compensation: Compensation | None = None,
) -> dict[str, Tensor]:
    """State dict of the converted FFN, in the dtype of the weights.

    Args:
        weights: the dense FFN. Its own output bias is part of the result in any case.
        layout: the layer's layout.
        router: its router, None if static.
        compensation: a down projection instead of the dense one, an output bias instead of the
            layout's, constants of the experts; as far as it has them.

    Raises:
        ValueError: the compensation is not of the layout's or the FFN's shape.
    """
    added_D, expert_bias_ED = layout.output_bias_D, None
    if compensation is not None:
        _check_compensation(weights, layout, compensation)
        if compensation.down_FD is not None:
            weights = replace(weights, down_FD=compensation.down_FD)
        if compensation.output_bias_D is not None:
            added_D = compensation.output_bias_D
        expert_bias_ED = compensation.expert_bias_ED
    permuted = weights.select(layout.permutation)
    biases = [b for b in (weights.output_bias_D, added_D) if b is not None]
    tensors = {
        "gate_weight": permuted.gate_FD,
        "up_weight": permuted.up_FD,
        "down_weight": permuted.down_FD,
        "gate_bias": permuted.gate_bias_F,
        "up_bias": permuted.up_bias_F,
        "output_bias": sum(bias.float() for bias in biases) if biases else None,
        "expert_bias": expert_bias_ED,
    }
    if router is not None:
        tensors |= {
            "router.weight": router.weight_ED,
            "router.scale": router.scale_E,
            "router.balance_bias": router.balance_bias_E,
            "router.up_weight": router.up_weight_ED,
            "router.bias": router.bias_E,
        }
    dtype = weights.gate_FD.dtype
    return {name: t.to(dtype) for name, t in tensors.items() if isinstance(t, Tensor)}


def _check_compensation(
    weights: GluWeights, layout: ExpertLayout, compensation: Compensation
) -> None:
    wanted = {
        "down_FD": (weights.intermediate_size, weights.hidden_size),
        "output_bias_D": (weights.hidden_size,),
        "expert_bias_ED": (layout.num_routed_experts, weights.hidden_size),
    }
    for name, tensor in compensation.tensors().items():
        if tensor.shape != wanted[name]:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)}, not {wanted[name]}")


def _matrix(rows: int, columns: int, std: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).normal_(0.0, std))


def _bias(*shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(*shape)) if shape[0] else None
