"""The part of ``eval`` that is about the router and the partition instead of the text quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.algorithms.statistics import LayerStatistics, sample_positions
from weaver.artifacts.manifest import InputRef
from weaver.artifacts.results import LayerRouterScores, RouterReport, RouterScores
from weaver.artifacts.types import FIRST_TOKENS, ExpertLayout, LayerProfile
from weaver.conversion.partition_settings import recorded_settings
from weaver.conversion.profiling import group_arguments, kept_positions
from weaver.conversion.splitter import LayerSplitter
from weaver.data.packing import PackedTokens
from weaver.errors import WeaverError
from weaver.evaluation.fidelity import KeptInputs, module_fidelity
from weaver.evaluation.stability import (
    expert_jaccard,
    sample_halves,
    score_correlation,
    shared_jaccard,
)
from weaver.methods.base import LayerProblem, MethodOptions
from weaver.rundir.inputs import Calibration, Partition, open_partition, read_packed_tokens
from weaver.rundir.stage_run import StageContext

# Held-out tokens per layer on which the router is compared with the oracle.
HELD_OUT_TOKENS = 2048


@dataclass(frozen=True)
class ReportInputs:
    """Inputs of the router report, besides the converted model and its text.

    Args:
        partition: the partition of the run.
        packed: the calibration tokens.
        sample_ids_N: calibration sample of every FFN input that the profiles keep.
        halves: which of these inputs belong to the first and to the second half.
    """

    partition: Partition
    packed: PackedTokens
    sample_ids_N: Tensor
    halves: tuple[Tensor, Tensor]

    def refs(self) -> dict[str, InputRef]:
        """The stages that the report reads."""
        return {"calibrate": self.partition.calibration.ref, "partition": self.partition.ref}


def open_report(context: StageContext) -> ReportInputs:
    """Open partition and calibration, and divide the calibration samples into halves.

    Raises:
        WeaverError: a stage is missing, there are fewer than two samples for a half, or a partition
            by groups would lack a group in one.
    """
    partition = open_partition(
        context.folder("partition"), trust_remote_code=context.trust_remote_code
    )
    calibration = partition.calibration
    packed = read_packed_tokens(calibration.folder)
    ids_T = packed.sample_ids_WT.reshape(-1)
    positions_N = kept_positions(
        ids_T.numel(),
        calibration.config,
        calibration.checkpoint.hidden_size,
        calibration.dtype,
        calibration.manifest.request.seed,
    )
    sample_ids_N = ids_T[positions_N]
    samples = sample_ids_N.unique().numel()
    if samples < 4:
        raise WeaverError(
            f"the profiles keep FFN inputs of {samples} calibration samples",
            why="the router report makes the partition again from two halves of the samples, and a "
            "half needs at least two",
            fix="eval with --no-router, or calibrate with a larger --tokens or "
            "--set calibrate.input_sample_mb=512",
        )
    halves = sample_halves(sample_ids_N, packed.sample_groups_M)
    if partition.group_experts() is not None:
        _require_groups(packed, [sample_ids_N[half_n] for half_n in halves])
    return ReportInputs(partition, packed, sample_ids_N, halves)


def _require_groups(packed: PackedTokens, halves: Sequence[Tensor]) -> None:
    for ids_n in halves:
        present = set(packed.sample_groups_M[ids_n.unique()].tolist())
        missing = [name for group, name in enumerate(packed.groups) if group not in present]
        if missing:
            raise WeaverError(
                f"half of the calibration samples have none of {', '.join(missing)}",
                why="the router report makes the partition again from two halves of the samples, "
                "and it is a partition by groups",
                fix="eval with --no-router, or calibrate with a larger --tokens or "
                "--set calibrate.input_sample_mb=512",
            )


def held_out_positions(windows: int, length: int, seed: int) -> Tensor:
    """Sample the tokens of the evaluated windows that the fidelity is measured on, ascending.

    A window's first tokens, whose experts no router with a threshold chooses, are left out.
    """
    first = min(FIRST_TOKENS, length - 1)
    routed = length - first
    generator = torch.Generator("cpu").manual_seed(seed)
    rows_N = sample_positions(windows * routed, HELD_OUT_TOKENS, generator)
    return rows_N // routed * length + rows_N % routed + first


def router_report(
    context: StageContext, inputs: ReportInputs, kept: Sequence[KeptInputs]
) -> RouterReport:
    """Fidelity of every router on held-out tokens, and stability of every layer's partition.

    The stability compares two partitions of each layer, made by the run's method with the run's
    options, sizes and seed, each from a profile of one half of the calibration samples: of the FFN
    inputs that ``calibrate`` kept, which are those of the dense model, also where the run's own
    partition was sequential.

    Args:
        context: progress.
        inputs: of ``open_report``.
        kept: held-out FFN inputs of the layers with routed experts.
    """
    by_layer = {entry.layer: entry for entry in kept}
    calibration = inputs.partition.calibration
    splitter = _ScoredSplitter(inputs.partition)
    rows = []
    layers = calibration.checkpoint.num_layers
    with context.progress("router report", layers) as advance:
        for layer in range(layers):
            dense = calibration.checkpoint.ffn(layer, torch.float32)
            values = _fidelity(by_layer.get(layer), dense) | _stability(inputs, splitter, layer)
            rows.append(LayerRouterScores(layer=layer, **values))
            advance(f"layer {layer}")
    first_n, second_n = inputs.halves
    return RouterReport(
        method=splitter.spec.name,
        tokens=kept[0].inputs().shape[0] if kept else 0,
        half_tokens=(first_n.numel(), second_n.numel()),
        mean=_mean(rows),
        layers=tuple(rows),
    )


class _ScoredSplitter:
    """Splits layers as the run's partition stage did, and notes the scores of their neurons."""

    def __init__(self, partition: Partition) -> None:
        request = partition.manifest.request
        settings = recorded_settings(request.config)
        self.spec = settings.spec
        self._scores_F: Tensor | None = None
        recording = replace(settings, spec=replace(self.spec, partition=self._recorded_partition))
        self._partition = partition
        self._splitter = LayerSplitter(partition.calibration, recording, request.seed)
        self._splitter.group_experts_G = partition.group_experts()

    def split(self, layer: int, profile: LayerProfile) -> tuple[ExpertLayout, Tensor | None]:
        """Layout of one layer, and the scores by which its shared neurons were chosen, (F,)."""
        active_neurons = self._partition.layout(layer).active_neurons
        self._scores_F = None  # a layer that keeps all of its neurons has none
        return self._splitter.split(layer, profile, active_neurons), self._scores_F

    def _recorded_partition(
        self, problem: LayerProblem, options: MethodOptions, generator: torch.Generator
    ) -> ExpertLayout:
        if self.spec.shared_scores is not None:
            self._scores_F = self.spec.shared_scores(problem, options)
        layout: ExpertLayout = self.spec.partition(problem, options, generator)
        return layout


def _fidelity(kept: KeptInputs | None, dense: GluWeights) -> dict[str, float | None]:
    names = ("oracle_agreement", "chance_agreement", "captured_contribution")
    found = {} if kept is None else asdict(module_fidelity(kept.inputs(), kept.ffn, dense))
    return {name: found.get(name) for name in names}


def _stability(
    inputs: ReportInputs, splitter: _ScoredSplitter, layer: int
) -> dict[str, float | None]:
    (first, first_F), (second, second_F) = (
        splitter.split(layer, profile) for profile in half_profiles(inputs, layer)
    )
    correlation = None
    if first_F is not None and second_F is not None:
        correlation = score_correlation(first_F, second_F)
    return {
        "expert_jaccard": expert_jaccard(first, second),
        "shared_jaccard": shared_jaccard(first, second),
        "score_correlation": correlation,
    }


def half_profiles(inputs: ReportInputs, layer: int) -> list[LayerProfile]:
    """Profiles of one layer of the dense model, each of one half of the calibration samples."""
    calibration: Calibration = inputs.partition.calibration
    weights = calibration.checkpoint.ffn(layer, calibration.dtype)
    x_ND = calibration.profile(layer).ffn_inputs_ND
    profiles = []
    for half_n in inputs.halves:
        samples_m, ids_n = inputs.sample_ids_N[half_n].unique(return_inverse=True)
        groups_m = inputs.packed.sample_groups_M[samples_m]
        statistics = LayerStatistics(
            weights,
            samples_m.numel(),
            calibration.config.activation_top_k,
            torch.arange(half_n.numel(), device=x_ND.device),
            **group_arguments(groups_m, inputs.packed, calibration.config),
        )
        statistics.update(x_ND[half_n], ids_n.to(x_ND.device))
        profiles.append(statistics.finish(groups_m))
    return profiles


def _mean(rows: Sequence[RouterScores]) -> RouterScores:
    """Means over the layers that have the value."""
    means: dict[str, float | None] = {}
    for name in RouterScores.model_fields:
        values = [value for row in rows if (value := getattr(row, name)) is not None]
        means[name] = sum(values) / len(values) if values else None
    return RouterScores(**means)
