"""The tensors that stages exchange, one dataclass per kind, validated when built.

Each type converts to and from a flat ``{name: tensor}`` mapping, which is what a safetensors file
holds; ``artifacts.store`` does the writing. Shape legend: see ``weaver.algorithms.glu``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from weaver.artifacts.record import TensorRecord

RouterKind = Literal["linear", "glu"]
ROUTER_KINDS: tuple[RouterKind, ...] = ("linear", "glu")
Selection = Literal["top-k", "threshold"]
SELECTIONS: tuple[Selection, ...] = ("top-k", "threshold")
Weighting = Literal["unit", "softmax"]
WEIGHTINGS: tuple[Weighting, ...] = ("unit", "softmax")

# Tokens at the start of a sequence that run every expert of a layer with a threshold: all later
# ones attend to them, and calibration text has too few of them for a fit.
FIRST_TOKENS = 2

# Tokens with little context in front of them, which few calibration tokens are like, and how much
# more than others they count in every fit. docs/LOG.md has what other weights gave.
EARLY_TOKENS, EARLY_WEIGHT = 16, 2.0

# Powers of a token's sensitivity that count in a refit, and where experts are selected. The
# sensitivity is that of small errors in one layer alone; those of a conversion are neither.
# docs/LOG.md has measurements.
REFIT_POWER, SELECTION_POWER = 0.6, 0.4


@dataclass(frozen=True)
class LayerProfile(TensorRecord):
    """Statistics of one layer's FFN over the calibration tokens.

    With ``g = act(gate)`` and ``h = g * up`` (see ``weaver.algorithms.glu``):

    Args:
        sample_gate_mean_MF: mean over the tokens of sample m of the signed gate activation g.
        sample_gate_abs_mean_MF: the same of ``|g|``.
        sample_tokens_M: tokens per sample, int64.
        sample_groups_M: group (task or domain) of each sample, int64.
        hidden_mean_F: ``E[h_j]`` over all tokens, float32.
        hidden_variance_F: ``Var(h_j)`` over all tokens (population), float32.
        marker_neurons_TA: per token the ids of the K_a most active neurons, int32.
        ffn_inputs_ND: a sample of FFN inputs x, (tokens kept, D).
        tokens: number of calibration tokens.
        group_tokens_G: tokens of each group, int64, (G,); the three of groups are there only where
            the calibration keeps groups apart.
        group_hidden_mean_GF: ``E[h_j]`` over the tokens of each group, float32.
        group_hidden_variance_GF: ``Var(h_j)`` over them (population), float32.
        input_places_N: place of each FFN input in its window, 0 for the first token, int32; None
            where the stream shows no windows (an expert of a MoE model): none is a first token.
        input_weights_N: how much an error in the output at each of them counts, float32, positive;
            None where all count the same. See ``weaver.algorithms.statistics.error_weights``, by
            which the mean and variance of h are weighted too.
        input_sensitivities_N: what a small error there is predicted to cost, 1 in the geometric
            mean, float32, positive (``weaver.algorithms.sensitivity``); None where not known.

    Raises:
        ValueError: places or weights are not one per FFN input.
    """

    sample_gate_mean_MF: Tensor
    sample_gate_abs_mean_MF: Tensor
    sample_tokens_M: Tensor
    sample_groups_M: Tensor
    hidden_mean_F: Tensor
    hidden_variance_F: Tensor
    marker_neurons_TA: Tensor
    ffn_inputs_ND: Tensor
    tokens: int
    group_tokens_G: Tensor | None = None
    group_hidden_mean_GF: Tensor | None = None
    group_hidden_variance_GF: Tensor | None = None
    input_places_N: Tensor | None = None
    input_weights_N: Tensor | None = None
    input_sensitivities_N: Tensor | None = None

    def __post_init__(self) -> None:
        for values_N in (self.input_places_N, self.input_weights_N, self.input_sensitivities_N):
            if values_N is not None and values_N.shape[0] != self.ffn_inputs_ND.shape[0]:
                raise ValueError("places and weights need one value per FFN input that is kept")

    def keeping(self, rows_n: Tensor) -> LayerProfile:
        """The profile with some of its FFN inputs only, by their numbers, (n,)."""

        def take(values_N: Tensor | None) -> Tensor | None:
            return None if values_N is None else values_N[rows_n]

        return replace(
            self,
            ffn_inputs_ND=self.ffn_inputs_ND[rows_n],
            input_places_N=take(self.input_places_N),
            input_weights_N=take(self.input_weights_N),
            input_sensitivities_N=take(self.input_sensitivities_N),
        )

    @property
    def first_tokens_N(self) -> Tensor:
        """Whether each FFN input is one of its sequence's ``FIRST_TOKENS``, bool, (N,)."""
        if self.input_places_N is None:
            return torch.zeros(
                self.ffn_inputs_ND.shape[0], dtype=torch.bool, device=self.ffn_inputs_ND.device
            )
        return self.input_places_N < FIRST_TOKENS

    @property
    def error_weights_N(self) -> Tensor:
        """How much an error at each FFN input counts in a refit, 1 on average, float32, (N,).

        ``input_weights_N``, times a power of the sensitivity, times ``EARLY_WEIGHT`` for a
        sequence's ``EARLY_TOKENS``.
        """
        return self._weights(REFIT_POWER)

    @property
    def selection_weights_N(self) -> Tensor:
        """The same where it decides which experts run."""
        return self._weights(SELECTION_POWER)

    def _weights(self, power: float) -> Tensor:
        weights_N = self.input_weights_N
        if weights_N is None:
            weights_N = torch.ones(self.ffn_inputs_ND.shape[0], device=self.ffn_inputs_ND.device)
        if self.input_sensitivities_N is not None:
            weights_N = weights_N * self.input_sensitivities_N.pow(power)
        if self.input_places_N is not None:
            early_N = self.input_places_N < EARLY_TOKENS
            weights_N = torch.where(early_N, EARLY_WEIGHT * weights_N, weights_N)
        return weights_N / weights_N.mean() if weights_N.numel() else weights_N

    @property
    def intermediate_size(self) -> int:
        return self.hidden_mean_F.shape[0]

    @property
    def hidden_second_moment_F(self) -> Tensor:
        """``E[h_j^2] = Var(h_j) + E[h_j]^2``, float32, (F,)."""
        return self.hidden_variance_F + self.hidden_mean_F.square()

    @property
    def gate_abs_mean_F(self) -> Tensor:
        """``E|g_j|`` over all tokens: the token-weighted mean of the per-sample means, (F,)."""
        weight_M = self.sample_tokens_M.to(self.sample_gate_abs_mean_MF.dtype)
        return (weight_M @ self.sample_gate_abs_mean_MF) / weight_M.sum()


@dataclass(frozen=True)
class ExpertLayout(TensorRecord):
    """Which neurons are shared and which belong to which routed expert.

    Args:
        intermediate_size: F of the dense FFN the ids refer to.
        top_k: K, routed experts active per token; 0 for a static layout. For "threshold" the mean
            number of routed experts per token that the router is set to.
        shared_S: neuron ids of the shared expert, int64, (S,).
        experts_EN: neuron ids per routed expert, int64, (E, N); (0, 0) for a static layout.
        output_bias_D: constant added to the output, for what was dropped; or None.
        selection: how a token's experts are chosen, see ``Router``: "top-k", or "threshold", where
            their number differs from token to token. A static layout has "top-k".
        weighting: how the outputs of a token's experts are combined, see ``Router``: "unit", or
            "softmax", only with "top-k". A static layout has "unit".
        routed_scaling: c of "softmax", positive; 1 for "unit".
        overlap: experts are prunings of the whole FFN: a neuron may belong to several of them, or
            to none. Without it no neuron stands twice.
        expert_bias_ED: constant that makes up for what each expert dropped, (E, D), or None; the
            layer has it as a ``Compensation``.

    Raises:
        ValueError: an id is out of range or used twice, K lies outside 1..E, nothing is left, or
            there is no such selection or weighting, nothing to select, or they do not agree.
    """

    intermediate_size: int
    top_k: int
    shared_S: Tensor
    experts_EN: Tensor
    output_bias_D: Tensor | None = None
    selection: Selection = "top-k"
    weighting: Weighting = "unit"
    routed_scaling: float = 1.0
    overlap: bool = False
    expert_bias_ED: Tensor | None = None

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection {self.selection!r} is not one of {SELECTIONS}")
        _check_weighting(self.weighting, self.routed_scaling)
        if self.shared_S.dim() != 1 or self.experts_EN.dim() != 2:
            raise ValueError("shared_S is a vector, experts_EN a matrix")
        neurons = self.permutation
        if neurons.numel() == 0:
            raise ValueError("layout holds no neuron")
        if int(neurons.min()) < 0 or int(neurons.max()) >= self.intermediate_size:
            raise ValueError(f"neuron id outside 0..{self.intermediate_size - 1}")
        self._check_repetitions()
        low = 1 if self.num_routed_experts else 0
        if not low <= self.top_k <= self.num_routed_experts:
            raise ValueError(f"top_k={self.top_k} outside {low}..{self.num_routed_experts}")
        if not self.num_routed_experts:
            for name, value, neutral in (
                ("selection", self.selection, "top-k"),
                ("weighting", self.weighting, "unit"),
            ):
                if value != neutral:
                    raise ValueError(f"{name} {value!r} of a layout without routed experts")
        if self.weighting == "softmax" and self.selection != "top-k":
            raise ValueError(f"softmax weights of experts that are selected by {self.selection}")
        if self.expert_bias_ED is not None and len(self.expert_bias_ED) != self.num_routed_experts:
            raise ValueError("expert_bias_ED needs one row per expert")

    def _check_repetitions(self) -> None:
        # Overlapping experts share neurons with each other, but not with the shared expert.
        groups = [self.permutation]
        if self.overlap:
            groups = [torch.cat([self.shared_S, expert_N]) for expert_N in self.experts_EN]
        for ids_n in groups:
            if ids_n.unique().numel() != ids_n.numel():
                raise ValueError("a neuron is assigned twice")

    @property
    def num_shared_neurons(self) -> int:
        return self.shared_S.numel()

    @property
    def num_routed_experts(self) -> int:
        return self.experts_EN.shape[0]

    @property
    def expert_width(self) -> int:
        return self.experts_EN.shape[1]

    @property
    def active_neurons(self) -> int:
        """S + K * N, the neurons computed per token; for "threshold" with K the intended mean."""
        return self.num_shared_neurons + self.top_k * self.expert_width

    @property
    def ffn_sparsity(self) -> float:
        """1 - (S + K * N) / F."""
        return 1.0 - self.active_neurons / self.intermediate_size

    @property
    def skips(self) -> bool:
        """Whether a token leaves neurons out that others, or the dense FFN, have."""
        return self.overlap or self.active_neurons < self.intermediate_size

    @property
    def permutation(self) -> Tensor:
        """Neuron ids in storage order: shared first, then expert by expert, (S + E * N,).

        With ``overlap`` an id stands as often as experts hold the neuron, and is stored as often.
        """
        return torch.cat([self.shared_S, self.experts_EN.reshape(-1)])


@dataclass(frozen=True)
class Router(TensorRecord):
    """The map from a token to its routed experts.

    ``linear``: ``s = x weight^T + bias``. ``glu``: ``s = |(x up_weight^T) * act(x weight^T)|``,
    one representative neuron per expert (CMoE).

    The layout names the selection. ``top-k``: the K largest of ``softmax(s) + balance_bias``.
    ``threshold``, only for ``linear``: every expert with ``s + balance_bias > 0``, which may be
    none or all of them; the threshold itself is part of the intercept.

    The weighting is the layout's, which the router repeats. ``unit``, for experts that are summands
    of one FFN: an expert's output is multiplied by ``1 + softmax(s) * scale``, which is exactly 1
    until fine-tuning moves ``scale``. ``softmax``, for experts each of which stands for the whole
    FFN, or for summands with c = K: the factor of a chosen expert is
    ``c * p_e / sum_{chosen} p`` with ``p = softmax(s)``; ``scale`` is not used.

    Args:
        kind: "linear" or "glu".
        weight_ED: router weight, or the representatives' gate columns, (E, D).
        scale_E: output scale, zeros when built without training, (E,).
        balance_bias_E: added for selection only, (E,).
        up_weight_ED: the representatives' up columns, (E, D); only for "glu".
        bias_E: intercept of the linear logits, (E,), or None; only for "linear".
        weighting: how the outputs of a token's experts are combined.
        routed_scaling: c of "softmax", positive; 1 for "unit".
        threshold_slope: of a threshold, how far it falls when twice as many experts shall run, in
            score units: the local slope of the scores' quantiles. 0 leaves it where it is.
        early_experts: of a threshold, mean number of experts at the ``EARLY_TOKENS`` of calibration
            windows, the first tokens left out; 0 where places were not known.
        late_experts: the same behind them.

    Raises:
        ValueError: shapes do not agree, the kind and the optional tensors do not, or there is no
            such weighting.
    """

    kind: RouterKind
    weight_ED: Tensor
    scale_E: Tensor
    balance_bias_E: Tensor
    up_weight_ED: Tensor | None = None
    bias_E: Tensor | None = None
    weighting: Weighting = "unit"
    routed_scaling: float = 1.0
    threshold_slope: float = 0.0
    early_experts: float = 0.0
    late_experts: float = 0.0

    def __post_init__(self) -> None:
        for name in ("threshold_slope", "early_experts", "late_experts"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is negative or not finite")
        _check_weighting(self.weighting, self.routed_scaling)
        if self.kind not in ROUTER_KINDS:
            raise ValueError(f"router kind {self.kind!r} is not one of {ROUTER_KINDS}")
        if (self.kind == "glu") != (self.up_weight_ED is not None):
            raise ValueError(f"router kind {self.kind!r} and up_weight_ED do not agree")
        if self.kind != "linear" and self.bias_E is not None:
            raise ValueError(f"router kind {self.kind!r} has no intercept bias_E")
        experts = self.weight_ED.shape[0]
        if self.scale_E.shape != (experts,) or self.balance_bias_E.shape != (experts,):
            raise ValueError("scale and balance bias need one value per expert")
        if self.up_weight_ED is not None and self.up_weight_ED.shape != self.weight_ED.shape:
            raise ValueError("weight_ED and up_weight_ED differ in shape")
        if self.bias_E is not None and self.bias_E.shape != (experts,):
            raise ValueError("the intercept needs one value per expert")


@dataclass(frozen=True)
class Compensation(TensorRecord):
    """Skip compensation of one converted layer: a refitted down projection and constants.

    ``y = h_shared Wd_shared + sum_{e selected} w_e (h_e Wd_e + b_e) + output_bias``

    with ``Wd`` the rows of ``down_FD`` and ``b_e`` those of ``expert_bias_ED``. Skip compensation
    supplies the mean output ``c_e = E[h_e Wd_e | e skipped]`` wherever expert e is skipped. That is
    the constant ``sum_e c_e`` for every token, and ``-c_e`` for each selected expert:
    ``output_bias = sum_e c_e`` and ``b_e = -c_e``, exact while the factors ``w_e`` are 1.

    Args:
        down_FD: down projection that takes the place of the dense one; row j belongs to neuron j
            of the dense FFN, (F, D), or None. Rows of neurons outside the layout are not used.
        output_bias_D: constant added to the output in the place of the layout's ``output_bias_D``,
            (D,), or None, which leaves the layout's.
        expert_bias_ED: constant added to the output of expert e where it is selected, (E, D), or
            None.

    Raises:
        ValueError: all three are None, or their shapes do not agree.
    """

    down_FD: Tensor | None = None
    output_bias_D: Tensor | None = None
    expert_bias_ED: Tensor | None = None

    def __post_init__(self) -> None:
        present = self.tensors()
        if not present:
            raise ValueError("a compensation without a tensor compensates nothing")
        for name, tensor in present.items():
            dimensions = 1 if name == "output_bias_D" else 2
            if tensor.dim() != dimensions or tensor.numel() == 0:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)}")
        if len({tensor.shape[-1] for tensor in present.values()}) > 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
            raise ValueError(f"hidden sizes differ: {shapes}")


def _check_weighting(weighting: Weighting, routed_scaling: float) -> None:
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not one of {WEIGHTINGS}")
    if not (math.isfinite(routed_scaling) and routed_scaling > 0):
        raise ValueError(f"routed_scaling={routed_scaling} is not positive")
    if weighting == "unit" and routed_scaling != 1:
        raise ValueError(f"routed_scaling={routed_scaling} of experts with weight 1")
