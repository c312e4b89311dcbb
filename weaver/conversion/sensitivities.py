"""Measuring what an error at each token costs, for the profiles of the FFNs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from weaver.algorithms.sensitivity import fit_sensitivity, predicted_sensitivity
from weaver.algorithms.statistics import error_weights
from weaver.artifacts.sensitivities import Sensitivities
from weaver.artifacts.types import FIRST_TOKENS, LayerProfile
from weaver.models.backward import fisher_gradients
from weaver.models.stream import DecoderStream
from weaver.rundir.stage_run import StageContext


def spread_windows(windows: int, tokens: int, length: int) -> Tensor:
    """Numbers of windows that hold about some tokens, spread over all of them, ascending, (n,)."""
    wanted = min(windows, max(1, tokens // length))
    return torch.arange(wanted, device="cpu") * windows // wanted


def measure_sensitivities(
    context: StageContext, stream: DecoderStream, folder: Path, title: str
) -> Sensitivities:
    """Sensitivities of every layer, from one backward pass over some windows.

    First tokens, which often carry an attention sink, are left out of the regressions.

    Args:
        context: progress, seed.
        stream: the dense model and the windows.
        folder: of the stage.
        title: of the progress.
    """
    checkpoint = stream.checkpoint
    windows, length = stream.input_ids_WT.shape
    places_T = torch.arange(length, device=stream.device).repeat(windows)
    later_T = places_T >= FIRST_TOKENS
    shape = (checkpoint.num_layers, checkpoint.hidden_size)
    direction_LD = torch.zeros(shape, device="cpu")
    offset_L = torch.zeros(checkpoint.num_layers, device="cpu")
    generator = torch.Generator(stream.device).manual_seed(context.seed)
    with context.progress(title, 2 * checkpoint.num_layers) as advance:
        for found in fisher_gradients(stream, folder, generator, lambda n: advance(f"layer {n}")):
            known_T = None
            if checkpoint.family.normed_output:
                known_T = error_weights(found.outputs_TD)[later_T]
            direction_LD[found.layer], offset_L[found.layer] = fit_sensitivity(
                found.inputs_TD[later_T], found.gradients_TD[later_T], places_T[later_T], known_T
            )
    return Sensitivities(direction_LD, offset_L)


def with_sensitivities(
    profile: LayerProfile, sensitivities: Sensitivities, layer: int
) -> LayerProfile:
    """The profile with the sensitivity of each of its inputs; that of first tokens is 1.

    Args:
        profile: of a dense model's layer.
        sensitivities: of the model.
        layer: index of the layer.
    """
    x_ND = profile.ffn_inputs_ND
    direction_D = sensitivities.direction_LD[layer].to(x_ND.device)
    found_N = predicted_sensitivity(x_ND, direction_D, float(sensitivities.offset_L[layer]))
    found_N[profile.first_tokens_N] = 1.0
    return replace(profile, input_sensitivities_N=found_N)
