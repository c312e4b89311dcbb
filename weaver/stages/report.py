"""``report``: what the stages of some runs left on disk, as facts to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from weaver.artifacts.affinity import Affinity
from weaver.artifacts.compared_runs import ComparedRun
from weaver.artifacts.manifest import MANIFEST, StageManifest, read_manifest
from weaver.artifacts.store import read_record
from weaver.artifacts.summaries import (
    AssembleSummary,
    FinetuneSummary,
    PartitionSummary,
    RouterSummary,
    read_summary,
)
from weaver.conversion.layer_budgets import predicted_layer_kl
from weaver.conversion.profiling import kept_positions
from weaver.errors import WeaverError
from weaver.kernels.reference import ExpertChoice, route
from weaver.methods.expertweaver import ExpertWeaverOptions, coefficient_of_variation
from weaver.report.run_facts import DomainUsage, NeuronFacts, RunFacts
from weaver.rundir.inputs import (
    Calibration,
    Partition,
    affinity_path,
    open_partition,
    read_packed_tokens,
    read_router,
)
from weaver.rundir.measurements import read_bench, read_eval
from weaver.rundir.stage_folders import STAGE_FOLDERS, finished_stage, stage_command
from weaver.stages.compare import compare_runs

# Activation rates of a histogram lie in bins of this factor, above the lowest one.
RATE_EDGES = (0.0, *(2.0**i for i in range(-12, 1)))
# Rows of a heat map that a page has room for.
MOST_GROUPS = 24
T = TypeVar("T")


def read_runs(run_dirs: Sequence[Path]) -> list[RunFacts]:
    """Read finished and evaluated runs; what is missing in one is named in its facts.

    Args:
        run_dirs: with a finished ``eval``.

    Raises:
        WeaverError: a directory holds no finished ``eval``, or a damaged file.
    """
    calibrations: dict[str, NeuronFacts] = {}
    names = _names(run_dirs)
    return [
        _read(run_dir, compared, name, calibrations)
        for run_dir, compared, name in zip(run_dirs, compare_runs(run_dirs), names, strict=True)
    ]


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two runs have the same."""
    short = [run_dir.resolve().name for run_dir in run_dirs]
    return short if len(set(short)) == len(short) else [str(run_dir) for run_dir in run_dirs]


def _read(
    run_dir: Path, compared: ComparedRun, name: str, calibrations: dict[str, NeuronFacts]
) -> RunFacts:
    manifests = {
        stage: read_manifest(run_dir / folder, rebuild=stage_command(stage, run_dir))
        for stage, folder in STAGE_FOLDERS.items()
        if (run_dir / folder / MANIFEST).exists()
    }
    missing: list[str] = []

    def attempt(what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except WeaverError as error:
            missing.append(f"{what}: {error.what}")
            return None

    partition = attempt("calibration", lambda: open_partition(run_dir / "partition"))
    neurons = domains = None
    if partition is not None:
        source = partition.calibration
        manifests = {"calibrate": source.manifest, **manifests}
        key = source.ref.digest
        if key not in calibrations and not source.checkpoint.is_moe:
            found = attempt("activation rates", lambda: neuron_facts(source))
            calibrations |= {} if found is None else {key: found}
        neurons = calibrations.get(key)
        domains = attempt("usage by domain", lambda: domain_usage(partition, run_dir / "router"))
    tuned = manifests.get("finetune")
    split, routers, assembled = (
        _finished(run_dir, stage) for stage in ("partition", "build-router", "assemble")
    )
    return RunFacts(
        name=name,
        compared=compared,
        manifests=manifests,
        quality=read_eval(run_dir),
        speed=read_bench(run_dir) if "bench" in manifests else None,
        split=read_summary(PartitionSummary, split.summary),
        routers=read_summary(RouterSummary, routers.summary),
        assembled=read_summary(AssembleSummary, assembled.summary),
        finetuned=read_summary(FinetuneSummary, tuned.summary) if tuned else None,
        predicted_kl=predicted_layer_kl(run_dir / "partition"),
        neurons=neurons,
        domains=domains,
        affinity=_affinity(run_dir / "partition"),
        missing=tuple(missing),
    )


def _finished(run_dir: Path, stage: str) -> StageManifest:
    return finished_stage(run_dir / STAGE_FOLDERS[stage], stage)[0]


def _affinity(folder: Path) -> Affinity | None:
    path = affinity_path(folder)
    return read_record(path, Affinity) if path.exists() else None


def activation_rates(calibration: Calibration, layer: int) -> Tensor:
    """Share of tokens among whose ``activation_top_k`` most active neurons each is, (F,).

    Source: CMoE, arXiv:2502.04416, activation rates.
    """
    profile = calibration.profile(layer)
    neurons = profile.hidden_mean_F.numel()
    counts_F = torch.bincount(profile.marker_neurons_TA.flatten().long(), minlength=neurons)
    return counts_F.float() / profile.tokens


def rate_counts(rate_F: Tensor) -> Tensor:
    """Number of neurons between two of ``RATE_EDGES``; a rate of 1 belongs to the last bin."""
    bins = len(RATE_EDGES) - 1
    bin_F = torch.bucketize(rate_F, torch.tensor(RATE_EDGES), right=True).clamp(1, bins) - 1
    return torch.bincount(bin_F, minlength=bins)


def neuron_facts(calibration: Calibration) -> NeuronFacts:
    """Activation rates and their variation over all layers of a calibration.

    Specialised are neurons with a coefficient of variation above tau, as ExpertWeaver counts them.
    """
    options = ExpertWeaverOptions()
    counts = torch.zeros(len(RATE_EDGES) - 1)
    variation, specialised = [], []
    for layer in range(calibration.summary.num_layers):
        rate_F = activation_rates(calibration, layer)
        counts += rate_counts(rate_F)
        variation.append(float(rate_F.std(correction=0) / rate_F.mean()))
        profile = calibration.profile(layer)
        if profile.sample_tokens_M.numel() > 1:
            gate_F = coefficient_of_variation(profile, options.eps)
            specialised.append(float((gate_F > options.tau).float().mean()))
    return NeuronFacts(
        digest=calibration.ref.digest,
        top_k=calibration.config.activation_top_k,
        histogram=(RATE_EDGES, tuple((counts / counts.sum()).tolist())),
        rate_variation=tuple(variation),
        specialised=tuple(specialised),
        tau=options.tau,
    )


@torch.no_grad()
def domain_usage(partition: Partition, routers: Path) -> DomainUsage | None:
    """Route the calibration's FFN inputs once more, and count experts by the groups of the text.

    With ``p(g, e)`` the share of selections that fall to expert e and a token of group g, the
    information of a layer is ``sum p(g, e) ln(p(g, e) / (p(g) p(e)))``.

    Args:
        partition: of the run.
        routers: folder of build-router.

    Returns:
        None of a model whose layers are static, or were experts before, or if there is one group.
    """
    calibration = partition.calibration
    packed = read_packed_tokens(calibration.folder)
    layers = [row.layer for row in partition.summary.layers if row.experts]
    if calibration.checkpoint.is_moe or not layers or len(packed.groups) < 2:
        return None
    ids_T = packed.sample_ids_WT.reshape(-1)
    positions_N = kept_positions(
        ids_T.numel(),
        calibration.config,
        calibration.checkpoint.hidden_size,
        calibration.dtype,
        calibration.manifest.request.seed,
    )
    group_N = packed.sample_groups_M[ids_T[positions_N]]
    tokens_G = torch.bincount(group_N, minlength=len(packed.groups))
    counts = {layer: _counts(partition, routers, layer, group_N, len(tokens_G)) for layer in layers}
    information = {layer: _information(counts_GE) for layer, counts_GE in counts.items()}
    best = max(information, key=information.__getitem__)
    rows = tokens_G.argsort(descending=True, stable=True)[:MOST_GROUPS]
    rows = rows[tokens_G[rows] > 0].sort().values
    shares_GE = counts[best] / tokens_G[:, None].clamp_min(1)
    return DomainUsage(
        groups=tuple(packed.groups[int(group)] for group in rows),
        layer=best,
        shares=tuple(tuple(row) for row in shares_GE[rows].tolist()),
        overall=tuple((counts[best].sum(0) / len(group_N)).tolist()),
        information=tuple(information.values()),
        tokens=len(group_N),
    )


def _counts(
    partition: Partition, routers: Path, layer: int, group_N: Tensor, groups: int
) -> Tensor:
    """Selections by group and expert, float64, (G, E)."""
    layout = partition.layout(layer)
    router = read_router(routers, layer, layout)
    assert router is not None
    x_ND = partition.profile(layer).ffn_inputs_ND.float()
    choice = ExpertChoice(layout.top_k, layout.selection)
    # A GLU router has the activation of its layer, others have none.
    activation = partition.calibration.checkpoint.activation
    chosen_NE = route(x_ND, router, activation, choice).selected_TE()
    counts_GE = torch.zeros(groups, layout.num_routed_experts, dtype=torch.float64)
    return counts_GE.index_add_(0, group_N, chosen_NE.double())


def _information(counts_GE: Tensor) -> float:
    p_GE = counts_GE / counts_GE.sum().clamp_min(1)
    expected_GE = p_GE.sum(1, keepdim=True) * p_GE.sum(0, keepdim=True)
    return max(0.0, float(torch.special.xlogy(p_GE, p_GE / expected_GE.clamp_min(1e-300)).sum()))
