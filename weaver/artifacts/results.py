"""Types of the results that ``eval`` writes to ``results.json``, and of the smoke test's result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Record(BaseModel):
    """A frozen JSON object: unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskResult(Record):
    """Scores of one model on one task.

    Args:
        name: file name of the task without suffix, or ``harness:NAME``.
        kind: the format the items had, or "harness".
        items: number of items scored.
        shots: examples before every item.
        metrics: "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "log_likelihood", "perplexity",
            as far as the kind has them; of the harness whatever it reports.
        correct: per metric that is a mean of hits, the hit (1) or miss (0) of every item in file
            order, for paired comparisons.
    """

    name: str
    kind: Literal["multiple-choice", "schema", "completion", "harness"]
    items: int = Field(ge=0)
    shots: int = Field(0, ge=0)
    metrics: dict[str, float]
    correct: dict[str, tuple[Literal[0, 1], ...]] = {}

    @model_validator(mode="after")
    def _one_hit_per_item(self) -> Self:
        for metric, hits in self.correct.items():
            if len(hits) != self.items:
                raise ValueError(f"{self.name}: {metric} has {len(hits)} values, not {self.items}")
        return self


class TaskScore(Record):
    """A metric of a task: of the dense model, of the converted one, and their difference.

    Args:
        task: the name it was asked by.
        metric: its name.
        items, shots: see ``TaskResult``.
        dense, converted: values; shares of 1 where ``is_share``.
        dense_error, converted_error: their standard errors; None where there is none.
        difference_error: standard error of converted less dense, paired by item,
            ``sqrt(var(d) / n)`` over the differences d of the n hits; None for what is no mean of
            hits.
    """

    task: str
    metric: str
    items: int
    shots: int
    dense: float
    converted: float
    dense_error: float | None = None
    converted_error: float | None = None
    difference_error: float | None = None

    @property
    def label(self) -> str:
        """Name of the task's file, and the metric."""
        return f"{Path(self.task).stem}, {self.metric}"

    @property
    def is_share(self) -> bool:
        """Whether the values are shares of items."""
        return self.metric.startswith(("acc", "exact_match"))


class LayerUsage(Record):
    """How often the routed experts of one layer were selected.

    With the counts ``c_e`` over T tokens and ``p_e = c_e / sum(c)``:

    Args:
        layer: index of the decoder layer.
        module: name of the module.
        tokens: T.
        token_share: ``c_e / T`` per expert; they sum to ``experts_per_token``.
        experts_per_token: ``sum(c) / T``, the mean number of selected experts: K for top-k, for a
            threshold what the router really selected on this text.
        coefficient_of_variation: population std of ``c_e`` over its mean; 0 when balanced.
        dead_share: share of experts with ``c_e = 0``.
        entropy: ``-sum p_e ln p_e`` in nats; ``ln E`` when balanced.

    A layer that selected nothing at all has a coefficient of variation and an entropy of 0.
    """

    layer: int = Field(ge=0)
    module: str
    tokens: int = Field(gt=0)
    token_share: tuple[Share, ...] = Field(min_length=1)
    experts_per_token: float = Field(ge=0.0)
    coefficient_of_variation: float = Field(ge=0.0)
    dead_share: Share
    entropy: float = Field(ge=0.0)

    @property
    def num_routed_experts(self) -> int:
        return len(self.token_share)


class WindowValues(Record):
    """Per-window means, for paired bootstraps; every list has one value per window.

    Args:
        dense_nll: mean negative log-likelihood of the dense model, nats per token.
        moe_nll: the same of the converted model.
        kl: mean KL(dense || converted), nats per token.
        top1_agreement: share of positions where both models put the same token first.
    """

    dense_nll: tuple[float, ...] = Field(min_length=1)
    moe_nll: tuple[float, ...] = Field(min_length=1)
    kl: tuple[float, ...] = Field(min_length=1)
    top1_agreement: tuple[Share, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_windows(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in type(self).model_fields}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"window lists differ in length: {lengths}")
        return self


class PositionKl(Record):
    """KL at a range of positions.

    Args:
        first: first position, counted from 1 at the start of a window.
        last: last position; None for all that follow.
        kl: mean KL(dense || converted) there, nats per token.
        tokens: positions that the mean was taken over, in all windows.
    """

    first: int = Field(ge=1)
    last: int | None
    kl: float
    tokens: int = Field(gt=0)


class ModelQuality(Record):
    """Scores of one model, dense or converted.

    Args:
        perplexity: ``exp`` of the mean negative log-likelihood over all windows.
        ffn_flops_per_token: FFN FLOPs per token, router included, 2 per multiply-add; where experts
            are selected by a threshold, at the mean number of experts that the router is set to.
        tasks: scores by task name.
    """

    perplexity: float = Field(ge=1.0)
    ffn_flops_per_token: int = Field(ge=0)
    tasks: dict[str, TaskResult] = {}


class RouterScores(Record):
    """Router fidelity and partition stability, of one layer or as means over layers.

    A value is None where it does not exist: fidelity of a static layer, experts or shared neurons
    that a layer does not have, a correlation where the method ranks no neurons.

    Args:
        oracle_agreement: share of the chosen pairs of token and expert that are among those whose
            omission would cost most: per token for top-k, for a threshold over all tokens at once.
        chance_agreement: the same for a random choice: chosen pairs over all pairs, K / E for
            top-k.
        captured_contribution: squared output norms of the chosen experts over those of that oracle;
            above 1 by rounding only.
        expert_jaccard: mean Jaccard index of the best-matched experts of two splits, each made from
            one half of the calibration samples.
        shared_jaccard: Jaccard index of their shared (static: kept) neurons.
        score_correlation: Spearman correlation of the scores by which the method ranks neurons for
            that part.
    """

    oracle_agreement: Share | None
    chance_agreement: Share | None
    captured_contribution: float | None = Field(ge=0.0, le=1.0 + 1e-5)
    expert_jaccard: Share | None
    shared_jaccard: Share | None
    score_correlation: float | None = Field(ge=-1.0, le=1.0)


class LayerRouterScores(RouterScores):
    """The scores of one decoder layer."""

    layer: int = Field(ge=0)


class RouterReport(Record):
    """Router report of ``weaver eval --router``: router fidelity and partition stability.

    Args:
        method: the method whose partition is measured.
        tokens: held-out tokens per layer behind the fidelity, inputs of the converted FFNs; 0 where
            no layer routes.
        half_tokens: sampled calibration tokens per layer behind each of the two splits, inputs of
            the dense FFNs.
        mean: means over the layers that have the value.
        layers: one entry per decoder layer.
    """

    method: str
    tokens: int = Field(ge=0)
    half_tokens: tuple[int, int]
    mean: RouterScores
    layers: tuple[LayerRouterScores, ...] = Field(min_length=1)


class ContinuedText(Record):
    """A prompt, and what both models write after it by greedy decoding."""

    prompt: str
    dense: str
    converted: str


class SmokeResult(Record):
    """Result of the smoke test at the end of ``assemble``; ``smoke_test`` in its summary.

    Args:
        tokens: positions of held-out text that predicted a token.
        kl: mean KL(dense || converted) over them, nats per token; None if a logit is not finite.
        not_finite, dense_not_finite: positions at which a logit of the converted, the dense model
            is NaN or infinite.
        repetition, dense_repetition: share of the 4-grams of greedy continuations that occurred
            before in the same one, mean over the prompts.
        texts: the continuations themselves.
        degenerate: what is wrong, a sentence each; empty if nothing is.
    """

    tokens: int = Field(gt=0)
    kl: float | None = Field(ge=0.0)
    not_finite: int = Field(ge=0)
    dense_not_finite: int = Field(ge=0)
    repetition: Share
    dense_repetition: Share
    texts: tuple[ContinuedText, ...] = ()
    degenerate: tuple[str, ...]


class EvalResult(Record):
    """``eval/results.json``: the converted model next to the dense one.

    Args:
        dense: scores of the dense model.
        moe: scores of the converted model.
        measured_ffn_flops_per_token: FFN FLOPs per token of the converted model at the mean numbers
            of experts in ``expert_usage``, to the nearest whole number: what this text really cost.
            That of ``moe`` where no layer selects by a threshold.
        kl: mean KL(dense || converted) in nats per token.
        predicted_kl: what the partition predicted it to be, on calibration text; None unless its
            allocation was ``fisher``, and after a fine-tuning.
        kl_by_position: the same by ranges of positions in the windows.
        top1_agreement: share of positions where both models put the same token first.
        tokens: positions that predicted a token, W * (T - 1).
        sequence_length: T, tokens per window.
        ffn_sparsity: 1 - active FFN neurons / dense FFN neurons, over all layers; for a threshold
            at the mean that the router is set to, like ``active_parameters``.
        dense_parameters: parameters of the dense model.
        dense_active_parameters: those that one token uses: all, unless the model had experts
            before; None in results that are older than this field.
        total_parameters: parameters of the converted model.
        active_parameters: parameters of the converted model that one token uses.
        windows: the values the means above were taken over.
        expert_usage: one entry per layer that has routed experts.
        router: router fidelity and partition stability; None unless asked for.
        config: the resolved configuration of the evaluation.
        versions: package versions that took part.
        digests: digests of the models and the data, by name.
    """

    dense: ModelQuality
    moe: ModelQuality
    measured_ffn_flops_per_token: int = Field(ge=0)
    kl: float = Field(ge=-1e-6)
    kl_by_position: tuple[PositionKl, ...] = Field(min_length=1)
    predicted_kl: float | None = None
    top1_agreement: Share
    tokens: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    ffn_sparsity: float = Field(ge=0.0, lt=1.0)
    dense_parameters: int = Field(gt=0)
    dense_active_parameters: int | None = None
    total_parameters: int = Field(gt=0)
    active_parameters: int = Field(gt=0)
    windows: WindowValues
    expert_usage: tuple[LayerUsage, ...] = ()
    router: RouterReport | None = None
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    digests: dict[str, str] = {}
