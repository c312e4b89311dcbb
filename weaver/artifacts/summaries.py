"""Types of ``summary`` in the manifests of the stages: the figures that their tables show."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from weaver.artifacts.bench_results import BenchResult
from weaver.artifacts.results import (
    PositionKl,
    Record,
    RouterReport,
    Share,
    SmokeResult,
    TaskScore,
)
from weaver.artifacts.types import Selection
from weaver.artifacts.verification import Verification
from weaver.errors import WeaverError


class FfnRow(Record):
    """One FFN.

    Args:
        layer: decoder layer, from 0.
        part: "expert 3" or "shared expert" of a model that had experts before; None for the whole
            FFN of a layer.
    """

    layer: int = Field(ge=0)
    part: str | None = None


class CalibratedFfn(FfnRow):
    """An FFN of a Mixture of Experts: F, and the calibration tokens that reached it."""

    neurons: int
    tokens: int


class CalibrateSummary(Record):
    """Summary of ``calibrate``.

    Args:
        num_layers, hidden_size: of the dense model.
        intermediate_size: F of the largest FFN.
        tokens, samples, groups: of the calibration text.
        sites: its FFNs, if the model is a Mixture of Experts.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    tokens: int
    samples: int
    groups: tuple[str, ...]
    sites: tuple[CalibratedFfn, ...] | None = None


class SplitFfn(FfnRow):
    """How an FFN was split.

    Args:
        shared_neurons, shared_share: S, and S / F.
        experts, expert_width, top_k: E, N and K.
        selection: how a token's experts are chosen.
        active_neurons, sparsity: S + K N, and 1 - (S + K N) / F.
        predicted_speedups: over the dense FFN by tokens per forward, from measured costs.
    """

    shared_neurons: int
    shared_share: Share
    experts: int
    expert_width: int
    top_k: int
    selection: Selection
    active_neurons: int
    sparsity: float
    predicted_speedups: dict[str, float]


class AffinitySummary(Record):
    """Domain affinity of a method that prunes by groups; see ``artifacts.affinity.Affinity``."""

    groups: tuple[str, ...]
    experts: tuple[int, ...]
    perplexity: tuple[tuple[float, ...], ...]
    text: str
    tokens: int


class PartitionSummary(Record):
    """Summary of ``partition``.

    Args:
        method: its name.
        scope: what sparsity is over: the neurons of the FFNs.
        layers: one entry per FFN.
        predicted_kl, uniform_kl: predicted KL of the chosen sizes and of equal ones, nats per
            token; None unless the allocation was ``fisher``.
        affinity: of a method that prunes by groups.
    """

    method: str
    scope: Literal["ffn"] = "ffn"
    layers: tuple[SplitFfn, ...]
    predicted_kl: float | None = None
    uniform_kl: float | None = None
    affinity: AffinitySummary | None = None


class PositionError(Record):
    """Relative squared error of an FFN's output between two positions, from 1; None: all after."""

    first: int
    last: int | None
    error: float


class RoutedFfn(FfnRow):
    """Fidelity of a router on calibration tokens; see ``evaluation.fidelity.RouterFidelity``."""

    oracle_agreement: float
    chance_agreement: float
    captured_contribution: float
    load_cv: float
    errors: tuple[PositionError, ...]


class RouterSummary(Record):
    """Summary of ``build-router``: the kind of router, None if static, and its layers."""

    router: str | None
    layers: tuple[RoutedFfn, ...]


class SkippedTest(Record):
    """A smoke test that was not made, and why."""

    skipped: str


class AssembleSummary(Record):
    """Summary of ``assemble``.

    Args:
        predicted_kl: as of ``partition``.
        dense_parameters, dense_active_parameters: of the dense model, and those a token uses.
        total_parameters, active_parameters: of the converted one.
        dense_ffn_flops, ffn_flops: per token, 2 per multiply-add, at every layer's K.
        ffn_sparsity: 1 - active FFN neurons / those of the dense model.
        speed_bound: dense over converted FLOPs of the whole model.
        smoke_test: None if it was switched off.
    """

    predicted_kl: float | None
    dense_parameters: int
    dense_active_parameters: int
    total_parameters: int
    active_parameters: int
    dense_ffn_flops: int
    ffn_flops: int
    ffn_sparsity: float
    speed_bound: float
    smoke_test: SmokeResult | SkippedTest | None


class PhaseSummary(Record):
    """A phase of a training: what it trained, toward what, and how many of its steps were done."""

    trainable: str
    objective: str
    steps: int
    steps_done: int


class EvaluationPoint(Record):
    """A held-out evaluation during a training; see ``training.guard.Evaluation``."""

    step: int
    phase: int
    perplexity: float
    kl: float
    dense_perplexity: float


class FinetuneSummary(Record):
    """Summary of ``finetune``.

    Args:
        losses: nats per token, one per step, over all phases.
        tokens: tokens read.
        seconds: time spent in steps.
        resumed_from: steps that were taken over from a checkpoint.
        phases: one entry per phase.
        evaluations: on held-out text, in order.
        best_step: of the weights that were written.
    """

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    resumed_from: int
    phases: tuple[PhaseSummary, ...]
    evaluations: tuple[EvaluationPoint, ...]
    best_step: int

    @property
    def best(self) -> EvaluationPoint:
        """The evaluation of the weights that were written."""
        return next(each for each in self.evaluations if each.step == self.best_step)


class ExportSummary(Record):
    """Summary of ``export``.

    Args:
        target: what was written, and ``reason`` why.
        approximations: what stands for what the target cannot hold.
        cost: what they cost against the run's model; None without any.
    """

    target: str
    reason: str
    approximations: tuple[str, ...]
    cost: Verification | None = None


class EvalSummary(Record):
    """Summary of ``eval``: the means of ``EvalResult``, and the metrics of tasks that are shown."""

    dense_perplexity: float
    moe_perplexity: float
    kl: float
    kl_by_position: tuple[PositionKl, ...]
    predicted_kl: float | None
    top1_agreement: Share
    ffn_sparsity: float
    dense_ffn_flops: int
    ffn_flops: int
    measured_ffn_flops: int
    active_parameters: int
    total_parameters: int
    tasks: tuple[TaskScore, ...]
    router: RouterReport | None


Summary = (
    CalibrateSummary
    | PartitionSummary
    | RouterSummary
    | AssembleSummary
    | FinetuneSummary
    | ExportSummary
    | EvalSummary
    | BenchResult
)
S = TypeVar("S", bound=Record)


def read_summary(kind: type[S], values: dict[str, Any]) -> S:
    """The summary in a stage's manifest.

    Raises:
        WeaverError: it is not what the stage writes.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise WeaverError(
            f"damaged {kind.__name__} in a manifest: {'.'.join(map(str, first['loc']))}",
            why=first["msg"],
            fix="weaver inspect --verify names the stage; rerun it with --force",
        ) from error
