"""Facts of a run that a report draws, read from the files of its stages."""

from __future__ import annotations

from dataclasses import dataclass

from weaver.artifacts.affinity import Affinity
from weaver.artifacts.bench_results import BenchResult
from weaver.artifacts.compared_runs import ComparedRun
from weaver.artifacts.manifest import StageManifest
from weaver.artifacts.results import EvalResult
from weaver.artifacts.summaries import (
    AssembleSummary,
    FinetuneSummary,
    PartitionSummary,
    RouterSummary,
)


@dataclass(frozen=True)
class NeuronFacts:
    """Activation statistics of a calibration, which the methods' papers argue with.

    Args:
        digest: of the calibration, which runs may share.
        top_k: neurons that every token marks as its most active ones.
        histogram: edges of activation rates and, between two of them, the share of the neurons of
            all layers; a neuron's rate is the share of tokens that mark it.
        rate_variation: by layer, standard deviation over mean of its neurons' rates.
        specialised: by layer, share of neurons whose gate varies between groups of text by more
            than the coefficient of variation ``tau``.
        tau: that bound.
    """

    digest: str
    top_k: int
    histogram: tuple[tuple[float, ...], tuple[float, ...]]
    rate_variation: tuple[float, ...]
    specialised: tuple[float, ...]
    tau: float


@dataclass(frozen=True)
class DomainUsage:
    """How the experts of a layer are used by the groups of the calibration text.

    Args:
        groups: names, those with most tokens.
        layer: the one where usage depends most on the group.
        shares: by group and expert, share of the group's tokens that select the expert.
        overall: by expert, the same of all tokens.
        information: by layer, mutual information between a token's group and a selected expert, in
            nats; 0 if all groups use the experts alike.
        tokens: tokens behind it.
    """

    groups: tuple[str, ...]
    layer: int
    shares: tuple[tuple[float, ...], ...]
    overall: tuple[float, ...]
    information: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report says of one run.

    Args:
        name: what the run is called in every picture.
        compared: the run beside its dense model and the first run.
        manifests: of its finished stages, by stage; the calibration's too.
        quality: what ``eval`` measured.
        speed: what ``bench`` measured, if it has run.
        split, routers, assembled, finetuned: summaries of the stages.
        predicted_kl: by layer, nats per token, at the chosen size; None unless the allocation was
            ``fisher``.
        neurons: None where the calibration is gone.
        domains: None of static layers, and where profiles or groups are missing.
        affinity: of a method that prunes by groups.
        missing: what could not be read, a sentence each.
    """

    name: str
    compared: ComparedRun
    manifests: dict[str, StageManifest]
    quality: EvalResult
    speed: BenchResult | None
    split: PartitionSummary
    routers: RouterSummary
    assembled: AssembleSummary
    finetuned: FinetuneSummary | None
    predicted_kl: tuple[float, ...] | None
    neurons: NeuronFacts | None
    domains: DomainUsage | None
    affinity: Affinity | None
    missing: tuple[str, ...]
