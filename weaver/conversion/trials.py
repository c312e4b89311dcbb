"""Trial conversions: each layer alone, fitted on some calibration tokens, measured on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weaver.algorithms.glu import glu_forward
from weaver.algorithms.sensitivity import predicted_kl
from weaver.artifacts.types import LayerProfile
from weaver.conversion.profiling import kept_positions
from weaver.conversion.sensitivities import spread_windows
from weaver.conversion.splitter import LayerSplitter
from weaver.errors import WeaverError
from weaver.models.accounting import LayerShape
from weaver.models.backward import fisher_gradients
from weaver.models.moe import MoEFeedForward
from weaver.models.stream import DecoderStream
from weaver.rundir.inputs import Calibration, read_packed_tokens
from weaver.rundir.stage_run import StageContext

# Calibration tokens for the sensitivities, and as many others on which trial layers are built.
SENSITIVITY_TOKENS = 2048


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
    fit = profile.keeping(trial.fit_n)
    layout = splitter.split(layer, fit, active)
    routed = splitter.route(layer, layout, fit)
    return splitter.converted_ffn(layer, layout, routed, torch.float32)


@dataclass(frozen=True)
class Trial:
    """Calibration rows for fitting and for measuring trial layers, with Fisher gradients.

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
        chosen_w = spread_windows(windows, 2 * max(SENSITIVITY_TOKENS, length), length)
        held_w = chosen_w[1::2]
        gradients_L = _gradients(context, calibration, ids_WT[held_w])
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
                fix="calibrate with a larger --set calibrate.input_sample_mb=512",
            )
        # Rows of the gradients are the tokens of the held-out windows, in order.
        slot_W = torch.zeros(windows, dtype=torch.int64, device="cpu").scatter(
            0, held_w, torch.arange(held_w.numel(), device="cpu")
        )
        kept_n = positions_N[held_out_n]
        rows_n = slot_W[kept_n // length] * length + kept_n % length
        gradients_L = [gradient_TD[rows_n] for gradient_TD in gradients_L]
        return cls(fit_n, held_out_n, gradients_L, ids_WT[held_w])


def _gradients(context: StageContext, calibration: Calibration, ids_WT: Tensor) -> list[Tensor]:
    """Fisher gradients at the outputs of the dense FFNs, one (W * T, D) per layer."""
    stream = DecoderStream(calibration.checkpoint, calibration.dtype, ids_WT)
    generator = torch.Generator(stream.device).manual_seed(context.seed)
    folder = context.folder("partition")
    with context.progress("partition: sensitivities", 2 * stream.checkpoint.num_layers) as advance:
        backward = fisher_gradients(stream, folder, generator, lambda n: advance(f"layer {n}"))
        gradients = [found.gradients_TD for found in backward]
    return gradients[::-1]
