"""Making up for skipped experts: constants and a re-solved down projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights, glu_hidden
from weaver.algorithms.ridge import ShrunkRegression
from weaver.artifacts.types import Compensation, ExpertLayout, LayerProfile, Router
from weaver.kernels.reference import ExpertChoice, route

# The tokens are added in so many chunks, of which every eighth is held out to choose the shrinkage:
# many enough that text of each kind is on both sides, long enough for full GEMM speed.
_CHUNKS = 32
_MAX_CHUNK_TOKENS = 2048

# Below this sum of weights no token was there: the sums are 0 too.
_LEAST_WEIGHT = 1e-12


@dataclass(frozen=True)
class CompensationPlan:
    """Plan of a layer's skip compensation: which parts are solved, and the shrinkage to try.

    Args:
        refit: re-solve the down projection.
        constants: supply the mean output of what is skipped.
        shrinkage: candidates of the regression's lambda, see ``ShrunkRegression``.
    """

    refit: bool
    constants: bool
    shrinkage: tuple[float, ...]


@torch.no_grad()
def solve_compensation(
    weights: GluWeights,
    profile: LayerProfile,
    layout: ExpertLayout,
    router: Router | None,
    plan: CompensationPlan,
) -> Compensation | None:
    """Compensation of one layer under its routing; None if the plan does nothing.

    With the selection ``m_te`` in {0, 1} fixed, the converted layer is linear in what is solved
    for: ``y_t = sum_{j shared} h_tj Wd_j + sum_e m_te (h_te Wd_e + b_e) + b``. Constants alone are
    the conditional means: ``c_e = E[h_e Wd_e | e skipped]``, ``b_e = -c_e``, ``b = sum_e c_e`` plus
    the mean output of neurons that the layout dropped. With ``refit``, ``Wd``, ``b_e`` and ``b``
    minimise the squared distance to the dense output over the profile's tokens, ``Wd`` shrunk
    toward the original (``ShrunkRegression``). Tokens count as ``LayerProfile.error_weights_N``
    says, and first tokens run all experts where the selection is by a threshold. Experts that
    overlap are not summands: their constants are those of the layout, made when it was.

    Args:
        weights: the dense FFN, float32.
        profile: its ``ffn_inputs_ND`` are the tokens.
        layout: shared and routed neurons.
        router: the layer's router; None for a static layer.
        plan: what to do.
    Source: weaver's own. The constants generalise FLAP's bias (arXiv:2312.11983) to experts that
        are skipped only for some tokens.
        Related: GRAIL (arXiv:2602.23795) for closed-form refits, MoNE (arXiv:2507.00390) for
        constants in the place of skipped parts.
    """
    if not plan.refit and not plan.constants:
        return None
    if layout.overlap:
        if plan.refit:
            raise ValueError("the down projection of experts that overlap cannot be re-solved")
        return Compensation(expert_bias_ED=layout.expert_bias_ED)
    start_PD, regression = _accumulate(weights, profile, layout, router, plan)
    solved_PD = regression.solve(start_PD, plan.shrinkage) if plan.refit else start_PD
    return _record(weights, layout, solved_PD, plan)


def _accumulate(
    weights: GluWeights,
    profile: LayerProfile,
    layout: ExpertLayout,
    router: Router | None,
    plan: CompensationPlan,
) -> tuple[Tensor, ShrunkRegression]:
    """Starting coefficients, rows [neurons, experts, one], and the sums of the regression."""
    neurons, experts = layout.permutation.numel(), layout.num_routed_experts
    columns = neurons + (experts + 1 if plan.constants else 0)
    regression = ShrunkRegression(columns, weights.hidden_size, neurons, weights.device)
    down_FD = weights.down_FD.float()
    sums = _SkipSums(layout)
    # In the dtype of the inputs, as ``sampled_hidden``; sums are float32 or more.
    typed = weights.to(profile.ffn_inputs_ND.dtype)
    chunk = min(_MAX_CHUNK_TOKENS, -(-profile.ffn_inputs_ND.shape[0] // _CHUNKS))
    rows = (profile.ffn_inputs_ND, profile.first_tokens_N, profile.error_weights_N)
    for x_TD, first_T, weight_T in zip(*(each.split(chunk) for each in rows), strict=True):
        # The routing is fixed: what the router chooses, and every expert for first tokens.
        typed_TF = glu_hidden(x_TD, typed)
        hidden_TF = typed_TF.float()
        chosen_TE = _chosen(x_TD, weights, layout, router)
        if layout.selection == "threshold":
            chosen_TE[first_T] = 1.0
        # Conditional means of skipped experts, which the constants start from.
        sums.add(hidden_TF, chosen_TE, weight_T)
        if plan.refit:
            # Gram matrix of what the converted layer adds up, against the dense output.
            z_TP = _regressors(hidden_TF, chosen_TE, layout, plan.constants)
            y_TD = (typed_TF @ typed.down_FD).float()
            if layout.output_bias_D is not None and not plan.constants:
                y_TD -= layout.output_bias_D  # the converted layer adds it already
            regression.add(z_TP, y_TD, weight_T)
    start_PD = down_FD[layout.permutation]
    if plan.constants:
        start_PD = torch.cat([start_PD, sums.constants(down_FD, layout)])
    return start_PD, regression


def _chosen(
    x_TD: Tensor, weights: GluWeights, layout: ExpertLayout, router: Router | None
) -> Tensor:
    if router is None:
        return torch.zeros(x_TD.shape[0], 0, device=x_TD.device)
    routing = route(x_TD, router, weights.activation, ExpertChoice(layout.top_k, layout.selection))
    return routing.selected_TE().float()


def _regressors(
    hidden_TF: Tensor, chosen_TE: Tensor, layout: ExpertLayout, constants: bool
) -> Tensor:
    """Neuron activations in storage order, zero where skipped; then selections and a one."""
    z_TP = hidden_TF[:, layout.permutation]
    if layout.num_routed_experts:
        routed_TEN = z_TP[:, layout.num_shared_neurons :].unflatten(1, layout.experts_EN.shape)
        routed_TEN.mul_(chosen_TE[:, :, None])
    if not constants:
        return z_TP
    return torch.cat([z_TP, chosen_TE, chosen_TE.new_ones(chosen_TE.shape[0], 1)], dim=1)


class _SkipSums:
    """Sums over tokens from which the conditional means of skipped experts follow."""

    def __init__(self, layout: ExpertLayout) -> None:
        experts, neurons = layout.num_routed_experts, layout.intermediate_size
        device = layout.shared_S.device
        self._hidden_F = torch.zeros(neurons, dtype=torch.float64, device=device)
        self._skipped_EF = self._hidden_F.new_zeros(experts, neurons)
        self._skips_E = self._hidden_F.new_zeros(experts)
        self._tokens = 0.0

    def add(self, hidden_TF: Tensor, chosen_TE: Tensor, weight_T: Tensor) -> None:
        skipped_TE = (1.0 - chosen_TE) * weight_T[:, None]
        self._hidden_F += weight_T @ hidden_TF
        self._skipped_EF += skipped_TE.T @ hidden_TF
        self._skips_E += skipped_TE.sum(0)
        self._tokens += float(weight_T.sum())

    def constants(self, down_FD: Tensor, layout: ExpertLayout) -> Tensor:
        """Rows ``b_e`` of the experts and ``b``, (E + 1, D)."""
        mean_EF = (self._skipped_EF / self._skips_E.clamp_min(_LEAST_WEIGHT)[:, None]).float()
        skipped_ED = down_FD.new_zeros(layout.num_routed_experts, down_FD.shape[1])
        for expert, neurons_N in enumerate(layout.experts_EN):
            skipped_ED[expert] = mean_EF[expert, neurons_N] @ down_FD[neurons_N]
        dropped_F = torch.ones_like(self._hidden_F, dtype=torch.bool)
        dropped_F[layout.permutation] = False
        mean_F = (self._hidden_F / max(_LEAST_WEIGHT, self._tokens)).float()
        bias_D = mean_F[dropped_F] @ down_FD[dropped_F] + skipped_ED.sum(0)
        return torch.cat([-skipped_ED, bias_D[None]])


def _record(
    weights: GluWeights, layout: ExpertLayout, solved_PD: Tensor, plan: CompensationPlan
) -> Compensation:
    neurons, experts = layout.permutation.numel(), layout.num_routed_experts
    down_FD = None
    if plan.refit:
        down_FD = weights.down_FD.float().clone()
        down_FD[layout.permutation] = solved_PD[:neurons]
    constants = plan.constants
    return Compensation(
        down_FD=down_FD,
        output_bias_D=solved_PD[-1].contiguous() if constants else None,
        expert_bias_ED=solved_PD[neurons:-1].contiguous() if constants and experts else None,
    )
