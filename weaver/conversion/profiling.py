"""Collecting layer profiles along a stream of hidden states that survives a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from weaver.algorithms.glu import GluWeights
from weaver.algorithms.statistics import LayerStatistics, input_rows, sample_positions
from weaver.artifacts.finite import overflow_advice, require_finite
from weaver.artifacts.sensitivities import Sensitivities
from weaver.artifacts.store import read_metadata, write_tensors
from weaver.artifacts.types import LayerProfile
from weaver.config.sections import CalibrateConfig
from weaver.conversion.sensitivities import with_sensitivities
from weaver.data.packing import PackedTokens
from weaver.errors import WeaverError
from weaver.kernels.reference import Routing
from weaver.models.device import CPU
from weaver.models.sites import Site
from weaver.models.stream import (
    SPILL_FILE,
    DecoderStream,
    DenseFfn,
    FfnObserver,
    InputTap,
    routing_tap,
)
from weaver.models.two_level import RoutingObserver

HIDDEN_STATES = "hidden_states.safetensors"


class ResumableStream:
    """Hidden states in front of the next layer, and a copy on disk to go on from.

    The copy is a cache: a missing or older one is made up for by running the layers in between
    again, with the same operations and so to the same bits.

    Args:
        stream: the decoder.
        folder: where the copy lies.
        ffn: the FFN, or the FFNs, that carry the hidden states past a finished layer.
    """

    def __init__(
        self, stream: DecoderStream, folder: Path, ffn: Callable[[int], nn.Module]
    ) -> None:
        self.stream = stream
        self.folder = folder
        self.ffn = ffn
        self.hidden_WTD = torch.empty(0, device=CPU)
        self.next_layer = -1

    def seek(self, layer: int) -> None:
        """Bring the hidden states in front of a layer."""
        if self.next_layer < 0:
            self._restore(layer)
        while self.next_layer < layer:
            self.advance(self.ffn(self.next_layer))

    def advance(self, ffn: nn.Module) -> None:
        """Run the next layer with the given FFN and step past it."""
        self.stream.run(self.next_layer, ffn, self.hidden_WTD, write=True)
        self.next_layer += 1

    def observe(self, observer: FfnObserver) -> None:
        """Show the inputs of the next layer's FFN, but stay in front of the layer."""
        self.stream.run(self.next_layer, InputTap(observer), self.hidden_WTD, write=False)

    def observe_routing(self, observer: RoutingObserver) -> None:
        """Show what reaches the experts of the next layer, a MoE one; stay in front of it."""
        tap = routing_tap(self.stream.checkpoint, self.next_layer, observer)
        self.stream.run(self.next_layer, tap, self.hidden_WTD, write=False)

    def save(self) -> None:
        """Write the copy."""
        write_tensors(
            self.folder / HIDDEN_STATES,
            {"hidden_WTD": self.hidden_WTD},
            {"next_layer": self.next_layer},
        )

    def discard(self) -> None:
        """Remove the copy once the stage is complete."""
        (self.folder / HIDDEN_STATES).unlink(missing_ok=True)
        (self.folder / SPILL_FILE).unlink(missing_ok=True)

    def _restore(self, layer: int) -> None:
        path = self.folder / HIDDEN_STATES
        try:
            found = int(read_metadata(path)["next_layer"]) if path.exists() else layer + 1
        except WeaverError:
            found = layer + 1
        if found > layer:
            self.hidden_WTD, self.next_layer = self.stream.embed(self.folder), 0
            return
        self.stream.prepare()
        self.hidden_WTD, self.next_layer = self.stream.allocate(self.folder), found
        with safe_open(path, framework="pt") as handle:
            rows = handle.get_slice("hidden_WTD")
            for window in range(self.hidden_WTD.shape[0]):
                self.hidden_WTD[window] = rows[window]


def kept_positions(
    tokens: int, config: CalibrateConfig, hidden_size: int, dtype: torch.dtype, seed: int
) -> Tensor:
    """Positions in the stream of the tokens whose FFN inputs a profile keeps, ascending.

    Args:
        tokens: length of the stream.
        config: how much is kept.
        hidden_size: D.
        dtype: dtype in which inputs are kept.
        seed: of the calibration.
    """
    rows = input_rows(config.input_sample_mb, hidden_size, dtype)
    return sample_positions(tokens, rows, torch.Generator("cpu").manual_seed(seed))


def group_arguments(
    sample_groups_M: Tensor, packed: PackedTokens, config: CalibrateConfig
) -> dict[str, Any]:
    """Return the group arguments of ``LayerStatistics``; none if the calibration mixes groups.

    Args:
        sample_groups_M: group of each sample that is profiled.
        packed: the calibration tokens, for the number of groups.
        config: of the calibration.
    """
    if not config.groups:
        return {}
    return {"sample_groups_M": sample_groups_M, "num_groups": len(packed.groups)}


class ExpertInputs:
    """Inputs of the FFNs of a MoE layer: those of all tokens, and the tokens of every expert.

    The inputs of a whole layer are kept, as large as its hidden states, since the statistics of
    many experts at once would be larger. Tokens are numbered along the stream.
    """

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._tokens = 0

    def add(self, x_TD: Tensor, routing: Routing) -> None:
        """Take the next tokens."""
        self._inputs.append(x_TD.detach().clone())
        self._pairs.append((routing.tokens_P + self._tokens, routing.experts_P))
        self._tokens += x_TD.shape[0]

    def tokens(self, site: Site) -> Tensor:
        """The tokens that a site sees, ascending; all for a shared expert."""
        if site.expert is None:
            return torch.arange(self._tokens, device=self._inputs[0].device)
        return torch.cat(
            [tokens_P[experts_P == site.expert] for tokens_P, experts_P in self._pairs]
        )

    def batches(self, tokens_n: Tensor) -> list[Tensor]:
        """The inputs of some tokens, ascending, in the batches in which they came."""
        rows, start = [], 0
        for x_TD in self._inputs:
            here_n = tokens_n[(tokens_n >= start) & (tokens_n < start + x_TD.shape[0])]
            rows.append(x_TD[here_n - start])
            start += x_TD.shape[0]
        return rows


class Profiler:
    """Makes the ``LayerProfile`` of the layer a stream stands in front of.

    Args:
        packed: the calibration tokens.
        config: which statistics are kept.
        dtype: dtype of the stream, which FFN inputs are kept in.
        seed: decides which FFN inputs are kept.
        sensitivities: of a dense model; None where they are not known.
    """

    def __init__(
        self,
        packed: PackedTokens,
        config: CalibrateConfig,
        dtype: torch.dtype,
        seed: int,
        sensitivities: Sensitivities | None,
    ) -> None:
        self.packed = packed
        self.config = config
        self.dtype = dtype
        self.seed = seed
        self.sensitivities = sensitivities

    def observe(self, stream: ResumableStream, weights: GluWeights) -> LayerProfile:
        """Profile the layer without moving on."""
        return self._profile(stream.next_layer, weights, stream.observe)

    def advance(self, stream: ResumableStream, weights: GluWeights) -> LayerProfile:
        """Profile the dense layer and step past it in the same pass."""
        layer = stream.next_layer
        return self._profile(layer, weights, lambda show: stream.advance(DenseFfn(weights, show)))

    def of_site(self, inputs: ExpertInputs, site: Site, weights: GluWeights) -> LayerProfile:
        """Profile of an FFN inside a MoE layer, over the tokens that reach it.

        Every token counts the same, whatever factor the outer router gives to the expert's output.
        Calibration samples of which no token reaches it are left out; without any token the profile
        is empty.
        """
        tokens_n = inputs.tokens(site)
        ids_n = self.packed.sample_ids_WT.reshape(-1).to(tokens_n.device)[tokens_n]
        samples_m, own_ids_n = ids_n.unique(return_inverse=True)
        if not tokens_n.numel():
            return self._empty(weights)
        statistics = LayerStatistics(
            weights,
            samples_m.numel(),
            self.config.activation_top_k,
            kept_positions(
                tokens_n.numel(), self.config, weights.hidden_size, self.dtype, self.seed
            ),
        )
        seen = 0
        for x_ND in inputs.batches(tokens_n):
            if x_ND.shape[0]:
                statistics.update(x_ND, own_ids_n[seen : seen + x_ND.shape[0]])
                seen += x_ND.shape[0]
        return statistics.finish(self.packed.sample_groups_M[samples_m.cpu()])

    def _empty(self, weights: GluWeights) -> LayerProfile:
        neurons = weights.intermediate_size
        return LayerProfile(
            sample_gate_mean_MF=torch.zeros(0, neurons, device=CPU),
            sample_gate_abs_mean_MF=torch.zeros(0, neurons, device=CPU),
            sample_tokens_M=torch.zeros(0, dtype=torch.int64, device=CPU),
            sample_groups_M=torch.zeros(0, dtype=torch.int64, device=CPU),
            hidden_mean_F=torch.zeros(neurons, device=CPU),
            hidden_variance_F=torch.zeros(neurons, device=CPU),
            marker_neurons_TA=torch.zeros(
                0, self.config.activation_top_k, dtype=torch.int32, device=CPU
            ),
            ffn_inputs_ND=torch.zeros(0, weights.hidden_size, dtype=self.dtype, device=CPU),
            tokens=0,
        )

    def _profile(
        self, layer: int, weights: GluWeights, run: Callable[[FfnObserver], None]
    ) -> LayerProfile:
        ids_T = self.packed.sample_ids_WT.reshape(-1).to(weights.device)
        statistics = LayerStatistics(
            weights,
            self.packed.sample_groups_M.numel(),
            self.config.activation_top_k,
            kept_positions(ids_T.numel(), self.config, weights.hidden_size, self.dtype, self.seed),
            **group_arguments(self.packed.sample_groups_M, self.packed, self.config),
            window=self.packed.input_ids_WT.shape[1],
        )
        seen = 0

        def observer(x_TD: Tensor) -> None:
            nonlocal seen
            tokens = x_TD.shape[0]
            statistics.update(x_TD, ids_T[seen : seen + tokens])
            seen += tokens

        run(observer)
        profile = statistics.finish(self.packed.sample_groups_M)
        why, fix = overflow_advice(self.dtype)
        require_finite(profile.tensors(), f"layer {layer}", why=why, fix=fix)
        if self.sensitivities is None:
            return profile
        return with_sensitivities(profile, self.sensitivities, layer)
