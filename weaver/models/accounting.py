"""The one accounting of parameters, FLOPs and bytes, for dense and converted models alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from weaver.artifacts.types import (
    Compensation,
    ExpertLayout,
    Router,
    RouterKind,
    Selection,
    Weighting,
)


@dataclass(frozen=True)
class LayerShape:
    """Shape of one converted FFN; also the entry of the layer in ``config.json``.

    What a token uses (active neurons and parameters, FLOPs) follows from K. Where experts are
    selected by a threshold, their number differs from token to token and K is the mean that the
    router was set to, so that these are means too, and intended ones: what a text really uses is
    ``flops`` with the mean that was counted on it.

    Args:
        num_shared_neurons: S.
        n_routed_experts: E, 0 for a static layer.
        moe_intermediate_size: N, neurons per routed expert.
        num_experts_per_tok: K, for "threshold" the mean per token that the router is set to.
        router_kind: "linear" or "glu"; None for a static layer.
        gate_bias: the gate projection has a bias.
        up_bias: the up projection has a bias.
        output_bias: the output has a bias, the model's own or a compensation.
        router_bias: the router has an intercept.
        expert_bias: every routed expert adds a constant to the output where it is selected.
        selection: how a token's experts are chosen; "top-k" for a static layer.
        weighting: how the outputs of a token's experts are combined; "unit" for a static layer.
        routed_scaling: c of "softmax"; 1 for "unit".
        threshold_slope, early_experts, late_experts: how a threshold is moved along a sequence, see
            ``Router`` and ``weaver.models.pacing``; 0 where there is none.
    """

    num_shared_neurons: int
    n_routed_experts: int = 0
    moe_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    router_kind: RouterKind | None = None
    gate_bias: bool = False
    up_bias: bool = False
    output_bias: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    selection: Selection = "top-k"
    weighting: Weighting = "unit"
    routed_scaling: float = 1.0
    threshold_slope: float = 0.0
    early_experts: float = 0.0
    late_experts: float = 0.0

    @classmethod
    def of(
        cls,
        layout: ExpertLayout,
        router: Router | None,
        compensation: Compensation | None = None,
        *,
        gate_bias: bool,
        up_bias: bool,
        output_bias: bool,
    ) -> Self:
        """The shape of a layout with its router and compensation.

        Args:
            layout: the layer's layout.
            router: its router, None if static.
            compensation: its compensation, if it has one.
            gate_bias, up_bias, output_bias: biases the dense FFN itself has.

        Raises:
            ValueError: layout and router weight the experts' outputs differently.
        """
        wanted = (layout.weighting, layout.routed_scaling)
        if router is not None and (router.weighting, router.routed_scaling) != wanted:
            found = (router.weighting, router.routed_scaling)
            raise ValueError(f"the layout's weighting is {wanted}, the router's {found}")
        added = (layout, compensation) if compensation is not None else (layout,)
        return cls(
            num_shared_neurons=layout.num_shared_neurons,
            n_routed_experts=layout.num_routed_experts,
            moe_intermediate_size=layout.expert_width,
            num_experts_per_tok=layout.top_k,
            router_kind=None if router is None else router.kind,
            gate_bias=gate_bias,
            up_bias=up_bias,
            output_bias=output_bias or any(each.output_bias_D is not None for each in added),
            router_bias=router is not None and router.bias_E is not None,
            expert_bias=compensation is not None and compensation.expert_bias_ED is not None,
            selection=layout.selection,
            weighting=layout.weighting,
            routed_scaling=layout.routed_scaling,
            threshold_slope=0.0 if router is None else router.threshold_slope,
            early_experts=0.0 if router is None else router.early_experts,
            late_experts=0.0 if router is None else router.late_experts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def total_neurons(self) -> int:
        """S + E * N, the neurons stored."""
        return self.num_shared_neurons + self.n_routed_experts * self.moe_intermediate_size

    @property
    def active_neurons(self) -> int:
        """S + K * N, the neurons computed per token; for "threshold" with K the intended mean."""
        return self.num_shared_neurons + self.num_experts_per_tok * self.moe_intermediate_size

    def parameters(self, hidden_size: int, *, active: bool) -> int:
        """Parameters stored (or read per token): FFN rows, biases, router matrices and scales.

        Constants of experts count as E * D stored and K * D read, the router's intercept as E. For
        "threshold" K is the intended mean, and so is the number read. The balance bias is a buffer,
        so that the sum is that over ``model.parameters()``.
        """
        experts = self.num_experts_per_tok if active else self.n_routed_experts
        neurons = self.active_neurons if active else self.total_neurons
        per_neuron = 3 * hidden_size + self.gate_bias + self.up_bias
        return (
            neurons * per_neuron
            + self.output_bias * hidden_size
            + self.expert_bias * experts * hidden_size
            + self.router_rows * hidden_size
            + (self.n_routed_experts * (1 + self.router_bias) if self.router_kind else 0)
        )

    def flops(self, hidden_size: int, mean_experts: float | None = None) -> int:
        """FLOPs per token, ``2 * D * (3 * (S + K * N) + router rows) + K * D``, a whole number.

        2 per multiply-add of a matrix; 1 per value of the selected experts' constants, the last
        term, where the layer has them. Other biases (one value per neuron, per expert in the
        router, or per layer in the output) are left out.

        Args:
            hidden_size: D.
            mean_experts: mean number of selected experts per token that was counted on some text,
                in the place of K; None for K itself.
        """
        experts = self.num_experts_per_tok if mean_experts is None else mean_experts
        neurons = self.num_shared_neurons + experts * self.moe_intermediate_size
        constants = self.expert_bias * experts * hidden_size
        return round(2 * hidden_size * (3 * neurons + self.router_rows) + constants)

    @property
    def sums_experts(self) -> bool:
        """An untrained router puts the factor 1 on every chosen expert: "unit", or one of weight 1.

        The softmax over a single chosen expert is 1.
        """
        alone = self.num_experts_per_tok == 1 and self.routed_scaling == 1
        return self.weighting == "unit" or alone

    @property
    def averages_experts(self) -> bool:
        """The weights of a token's experts add up to 1: each stands for the whole FFN."""
        return self.weighting == "softmax" and self.routed_scaling == 1

    @property
    def router_rows(self) -> int:
        """Rows of the router's matrices: E, or 2 E of a glu router."""
        return {None: 0, "linear": 1, "glu": 2}[self.router_kind] * self.n_routed_experts


@dataclass(frozen=True)
class DenseFfnSize:
    """One FFN before the conversion.

    Args:
        shape: size and biases, all neurons shared.
        token_share: share of the tokens that reach it: 1, or for an expert of a model that is a
            Mixture of Experts already what it has at equal load, K / E of that level.
    """

    shape: LayerShape
    token_share: float = 1.0


@dataclass(frozen=True)
class ModelAccount:
    """Parameters, FLOPs and sparsity of a whole model before and after its conversion.

    Sums over FFNs are weighted by each FFN's ``token_share``: what a token uses of two levels
    of experts is the outer K times what it uses of one of their FFNs. Routers and shared experts
    that the model had before count on both sides.

    Args:
        hidden_size: D.
        intermediate_size: F of the dense model; of its largest FFN, if it had experts before.
        total_dense_parameters: all parameters of the dense model, tied embeddings counted once.
        layers: shape of every converted FFN; one per layer, unless the model had experts before.
        dense_gate_bias, dense_up_bias, dense_output_bias: biases the dense FFN itself has.
        sites: every FFN before the conversion; none for a dense model, whose layers are all of
            ``intermediate_size`` and see every token.
        outer_flops: FLOPs per token of the routers that the model had before.
    """

    hidden_size: int
    intermediate_size: int
    total_dense_parameters: int
    layers: Sequence[LayerShape]
    dense_gate_bias: bool = False
    dense_up_bias: bool = False
    dense_output_bias: bool = False
    sites: Sequence[DenseFfnSize] = ()
    outer_flops: int = 0

    @property
    def dense_layer(self) -> LayerShape:
        """The dense FFN as a shape: every neuron shared, no router."""
        return LayerShape(
            num_shared_neurons=self.intermediate_size,
            gate_bias=self.dense_gate_bias,
            up_bias=self.dense_up_bias,
            output_bias=self.dense_output_bias,
        )

    @property
    def dense(self) -> Sequence[DenseFfnSize]:
        """Every FFN before the conversion."""
        return self.sites or [DenseFfnSize(self.dense_layer)] * len(self.layers)

    def _weighted(self, value: Callable[[LayerShape], float], *, converted: bool) -> float:
        """Sum of a value over the FFNs, by the share of the tokens that reach them."""
        return sum(
            dense.token_share * value(layer if converted else dense.shape)
            for layer, dense in zip(self.layers, self.dense, strict=True)
        )

    @property
    def _outside(self) -> int:
        """Parameters outside the FFNs."""
        stored = sum(ffn.shape.parameters(self.hidden_size, active=False) for ffn in self.dense)
        return self.total_dense_parameters - stored

    @property
    def total_parameters(self) -> int:
        """Parameters of the converted model."""
        return self._outside + sum(
            layer.parameters(self.hidden_size, active=False) for layer in self.layers
        )

    @property
    def active_parameters(self) -> int:
        """Parameters of the converted model that one token uses, embeddings included.

        At every layer's K, which for a threshold is the intended mean.
        """
        return self._outside + round(self._weighted(self._read, converted=True))

    @property
    def dense_active_parameters(self) -> int:
        """Parameters of the dense model that one token uses: all, unless it had experts before."""
        return self._outside + round(self._weighted(self._read, converted=False))

    def _read(self, shape: LayerShape) -> int:
        return shape.parameters(self.hidden_size, active=True)

    @property
    def dense_ffn_flops(self) -> int:
        """FFN FLOPs per token of the dense model."""
        return self.outer_flops + round(self._weighted(self._flops, converted=False))

    @property
    def ffn_flops(self) -> int:
        """FFN FLOPs per token of the converted model, routers included, at every layer's K."""
        return self.outer_flops + round(self._weighted(self._flops, converted=True))

    def _flops(self, shape: LayerShape) -> int:
        return shape.flops(self.hidden_size)

    def measured_ffn_flops(
        self, mean_experts: Mapping[int, float], token_shares: Mapping[int, float] | None = None
    ) -> int:
        """``ffn_flops`` at the numbers of experts that were counted on some text.

        Args:
            mean_experts: mean number of selected experts per token, by the number of the FFN; one
                value for every FFN with routed experts that a token reached.
            token_shares: share of the tokens that reached an FFN, by its number; where it is not
                given, as intended.

        Raises:
            KeyError: an FFN with routed experts has no value, though tokens reached it.
        """
        shares = dict(enumerate(ffn.token_share for ffn in self.dense)) | dict(token_shares or {})
        return self.outer_flops + round(
            sum(
                shares[site]
                * layer.flops(
                    self.hidden_size, mean_experts[site] if layer.n_routed_experts else None
                )
                for site, layer in enumerate(self.layers)
                if shares[site]
            )
        )

    @property
    def ffn_sparsity(self) -> float:
        """1 - active neurons / dense neurons that a token would use, at every layer's K."""
        active = self._weighted(lambda shape: shape.active_neurons, converted=True)
        return 1.0 - active / self._weighted(lambda shape: shape.active_neurons, converted=False)

    @property
    def speed_bound(self) -> float:
        """Ceiling of the speed-up: parameters that a token uses, dense over converted.

        Embedding rows are looked up, not multiplied, so an untied embedding table counts on both
        sides and makes this bound slightly too low; a tied one is read by the output head.
        """
        return self.dense_active_parameters / self.active_parameters
