"""How many neurons of every layer stay active: the allocations of ``partition``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weaver.algorithms.energy import centred_energy
from weaver.algorithms.glu import glu_forward
from weaver.artifacts.store import read_json, write_json
from weaver.artifacts.types import LayerProfile
from weaver.errors import WeaverError
from weaver.evaluation.sensitivity import output_gradients, predicted_kl
from weaver.methods.allocation import adaptive_active_neurons
from weaver.methods.budget import ErrorCurve, allocate_slices
from weaver.methods.registry import get_router
from weaver.models.accounting import LayerShape
from weaver.models.loading import load_model
from weaver.models.moe import MoEFeedForward
from weaver.stages.calibrate import read_packed_tokens
from weaver.stages.parents import Calibration
from weaver.stages.profiling import kept_positions
from weaver.stages.runner import StageContext
from weaver.stages.splitter import LayerSplitter

BUDGET_FILE = "budget.json"

# Calibration tokens for the sensitivities, and as many others on which trial layers are built.
SENSITIVITY_TOKENS = 2048

# Active slices at which a layer is tried, as multiples of the uniform number.
TRIAL_SHARES = (0.6, 1.0, 1.4)

# A static method's neurons are given out in this many slices.
STATIC_SLICES = 64


@dataclass(frozen=True)
class Budget:
    """What every layer may use.

    Args:
        active_neurons: A of each layer.
        predicted_kl: sum of the layers' predicted KL; None where nothing was predicted.
        uniform_kl: the same sum with equal layers.
    """

    active_neurons: list[int]
    predicted_kl: float | None = None
    uniform_kl: float | None = None


def allocate(context: StageContext, folder: Path, splitter: LayerSplitter) -> Budget:
    """Active neurons of every layer, by the configured allocation.

    ``fisher`` tries every layer alone at several sizes: it is split, routed and compensated from
    some calibration tokens, and its error on others is weighted by the Fisher gradients there
    (``predicted_kl``). The sizes with the least total under one budget of FLOPs, routers counted
    in, are found on the convex hulls of these curves.

    Args:
        context: progress, seed.
        folder: of the partition stage; what ``fisher`` found is kept there.
        splitter: method and configuration.
    """
    config, checkpoint = splitter.config, splitter.checkpoint
    if config.allocation == "uniform":
        return Budget([splitter.uniform_neurons] * checkpoint.num_layers)
    if config.allocation == "adaptive":
        scores = [
            centred_energy(
                splitter.calibration.profile(layer).hidden_variance_F,
                checkpoint.ffn(layer, torch.float32).down_FD,
            )
            for layer in range(checkpoint.num_layers)
        ]
        widths = splitter.num_experts, splitter.width
        return Budget(adaptive_active_neurons(scores, *widths, config.sparsity))
    path = folder / BUDGET_FILE
    if not path.exists():
        slices = Slices.of(splitter)
        curves = measure_curves(context, splitter, slices)
        write_json(path, _divided(curves, slices, config.sparsity, splitter.uniform_neurons))
    found = read_json(path, rebuild="weaver partition --force")
    return Budget(found["active_neurons"], found["predicted_kl"], found["uniform_kl"])


@dataclass(frozen=True)
class Slices:
    """The pieces in which a layer's neurons are given out.

    Args:
        neurons: F.
        count: slices of a layer: Ne, or ``STATIC_SLICES`` of a static method.
        width: neurons of a slice.
        router_rows: rows of the router, in which a routed layer costs extra.
    """

    neurons: int
    count: int
    width: int
    router_rows: int

    @classmethod
    def of(cls, splitter: LayerSplitter) -> Slices:
        """The slices of a method."""
        neurons, experts = splitter.checkpoint.intermediate_size, splitter.num_experts
        if experts:
            assert splitter.config.propagate is not None
            assert splitter.config.propagate.kind is not None
            kind = get_router(splitter.config.propagate.kind).kind
            router_rows = LayerShape(0, experts, splitter.width, 1, kind).router_rows
            return cls(neurons, experts, splitter.width, router_rows)
        count = min(STATIC_SLICES, neurons)
        return cls(neurons, count, neurons // count, 0)

    @property
    def leftover(self) -> int:
        """Neurons that no slice holds; they are always active."""
        return self.neurons - self.count * self.width

    def active(self, slices: int) -> int:
        """Neurons that so many active slices make."""
        return self.leftover + slices * self.width

    def trials(self, sparsity: float) -> tuple[int, ...]:
        """Numbers of active slices at which a layer is tried."""
        low = 2 if self.router_rows and self.count > 2 else 1
        uniform = self.count * (1.0 - sparsity)
        sizes = {max(low, round(uniform * share)) for share in TRIAL_SHARES}
        return tuple(sorted(size for size in sizes if size < self.count))


def measure_curves(
    context: StageContext, splitter: LayerSplitter, slices: Slices
) -> list[ErrorCurve]:
    """Error curve of every layer, see ``allocate``."""
    trial = Trial.prepare(context, splitter.calibration)
    sizes = slices.trials(splitter.config.sparsity)
    active = [slices.active(size) for size in sizes]
    return [
        ErrorCurve(sizes, tuple(tried.predicted_kl for tried in row), slices.count)
        for row in try_layers(context, splitter, trial, active, "partition: budgets")
    ]


@dataclass(frozen=True)
class TriedLayer:
    """A layer that was converted alone, at one size.

    Args:
        predicted_kl: nats per token, measured on tokens that it was not fitted on.
        shape: of the converted FFN.
    """

    predicted_kl: float
    shape: LayerShape


def try_layers(
    context: StageContext,
    splitter: LayerSplitter,
    trial: Trial,
    active: Sequence[int],
    title: str,
) -> list[list[TriedLayer]]:
    """Every layer alone at some numbers of active neurons, on the dense model's profiles.

    Args:
        context: progress.
        splitter: method and configuration.
        trial: tokens to fit on and to measure on.
        active: numbers of active neurons.
        title: of the progress.
    Returns:
        One list per layer, in the order of ``active``.
    Raises:
        WeaverError: the method cannot split a layer at one of these sizes.
    """
    rows = []
    layers = splitter.checkpoint.num_layers
    with context.progress(title, layers) as advance:
        for layer in range(layers):
            profile = splitter.calibration.profile(layer)
            rows.append([_try_layer(splitter, trial, layer, profile, size) for size in active])
            advance(f"layer {layer}")
    return rows


def _try_layer(
    splitter: LayerSplitter, trial: Trial, layer: int, profile: LayerProfile, active: int
) -> TriedLayer:
    ffn = convert_alone(splitter, trial, layer, profile, active)
    x_TD = profile.ffn_inputs_ND[trial.held_out_n].float()
    dense_TD = glu_forward(x_TD, splitter.checkpoint.ffn(layer, torch.float32))
    kl = predicted_kl(ffn(x_TD) - dense_TD, trial.gradients_L[layer])
    return TriedLayer(kl, ffn.shape)


def convert_alone(
    splitter: LayerSplitter, trial: Trial, layer: int, profile: LayerProfile, active: int
) -> MoEFeedForward:
    """One layer, split, routed and compensated from the trial's tokens, float32."""
    fit = replace(profile, ffn_inputs_ND=profile.ffn_inputs_ND[trial.fit_n])
    layout = splitter.split(layer, fit, active)
    routed = splitter.route(layer, layout, fit)
    return splitter.converted_ffn(layer, layout, routed, torch.float32)


@dataclass(frozen=True)
class Trial:
    """What trial layers are fitted on and measured on.

    Args:
        fit_n: rows of the profiles' FFN inputs to fit on.
        held_out_n: rows to measure on.
        gradients_L: Fisher gradients at the latter, one (T, D) per layer.
        windows_WT: the windows that the latter come from.
    """

    fit_n: Tensor
    held_out_n: Tensor
    gradients_L: list[Tensor]
    windows_WT: Tensor

    @classmethod
    def prepare(cls, context: StageContext, calibration: Calibration) -> Trial:
        """Choose windows spread over the calibration set, alternately for either purpose.

        Raises:
            WeaverError: there are fewer than two windows, or no FFN inputs of some were kept.
        """
        checkpoint = calibration.checkpoint
        ids_WT = read_packed_tokens(calibration.folder).input_ids_WT
        windows, length = ids_WT.shape
        if windows < 2:
            raise WeaverError(
                f"{windows} calibration window",
                why="trial layers are fitted on some windows and measured on others",
                fix="calibrate with more --tokens; fisher budgets: or --allocation uniform",
            )
        wanted = min(windows, 2 * max(1, SENSITIVITY_TOKENS // length))
        chosen_w = torch.arange(wanted) * windows // wanted
        model = load_model(
            checkpoint.folder,
            calibration.dtype,
            trust_remote_code=checkpoint.model.trust_remote_code,
        )
        ffns = [
            model.get_submodule(f"{checkpoint.family.layers}.{layer}.{checkpoint.family.ffn}")
            for layer in range(checkpoint.num_layers)
        ]
        held_w = chosen_w[1::2]
        generator = torch.Generator().manual_seed(context.seed)
        with context.progress("partition: sensitivities", held_w.numel()) as advance:
            gradients_L = output_gradients(
                model, ffns, ids_WT[held_w], generator, lambda n: advance(f"window {n}")
            )
        positions_N = kept_positions(
            ids_WT.numel(),
            calibration.config,
            checkpoint.hidden_size,
            calibration.dtype,
            calibration.manifest.request.seed,
        )
        held_out_n = torch.isin(positions_N // length, held_w).nonzero().flatten()
        fit_n = torch.isin(positions_N // length, chosen_w[0::2]).nonzero().flatten()
        if not fit_n.numel() or not held_out_n.numel():
            raise WeaverError(
                f"the profiles keep {positions_N.numel()} of {ids_WT.numel()} FFN inputs, none in "
                "some windows",
                why="trial layers are fitted on some windows and measured on others",
                fix="calibrate with a larger --input-sample-mb",
            )
        # Rows of the gradients are the tokens of the held-out windows, in order.
        slot_W = torch.zeros(windows, dtype=torch.int64).scatter(
            0, held_w, torch.arange(held_w.numel())
        )
        kept_n = positions_N[held_out_n]
        rows_n = slot_W[kept_n // length] * length + kept_n % length
        gradients_L = [gradient_TD[rows_n] for gradient_TD in gradients_L]
        return cls(fit_n, held_out_n, gradients_L, ids_WT[held_w])


def _divided(
    curves: Sequence[ErrorCurve], slices: Slices, sparsity: float, uniform: int
) -> dict[str, Any]:
    """What ``budget.json`` holds."""
    # In rows of 2 D FLOPs: three per neuron, one per expert of a router.
    budget = 3.0 * len(curves) * (slices.neurons * (1.0 - sparsity) - slices.leftover)
    chosen = allocate_slices(curves, 3.0 * slices.width, slices.router_rows, budget)
    equal = (uniform - slices.leftover) // slices.width
    return {
        "active_neurons": [slices.active(count) for count in chosen],
        "predicted_kl": sum(c.at(n) for c, n in zip(curves, chosen, strict=True)),
        "uniform_kl": sum(c.at(equal) for c in curves),
        "num_slices": slices.count,
        "trials": [list(curve.slices) for curve in curves],
        "kl": [list(curve.kl) for curve in curves],
    }
