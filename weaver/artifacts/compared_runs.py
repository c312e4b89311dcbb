"""Types of what ``weaver compare`` says about runs."""

from __future__ import annotations

from weaver.artifacts.results import Record, Share, TaskScore


class Interval(Record):
    """A mean and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference that it is of is significant."""
        return self.low > 0 or self.high < 0


class ComparedTask(Record):
    """A metric of a task.

    Args:
        score: of this run and of its dense model.
        from_dense: difference of the hits from the dense model's, paired by item; None for what is
            no mean of hits.
        difference: of the hits of this run and the first one's, paired by item; None for the first
            run, for what is no mean of hits, and where the items differ.
    """

    score: TaskScore
    from_dense: Interval | None = None
    difference: Interval | None = None


class ComparedRun(Record):
    """One run, against its own dense model and against the first run.

    Args:
        run: its directory.
        model: the dense model as its user named it.
        method: of the partition.
        finetuned: whether the fine-tuned model was measured.
        ffn_sparsity: 1 - active FFN neurons / those of the dense model.
        ffn_flops: measured FFN FLOPs over the dense model's.
        kl: KL(dense || converted) in nats per token, over windows.
        kl_difference: this run's less the first one's, paired by window; None for the first run and
            where text or windows differ.
        perplexity, dense_perplexity: on the same text.
        nll_increase: negative log-likelihood above the dense model's in nats per token, paired by
            window; its exponential is the ratio of the perplexities.
        top1_agreement: share of positions where both models put the same token first.
        tasks: by task and metric.
        active_parameters, total_parameters: of the converted model.
        model_bytes: of its weights on disk.
        speedups: over the dense model by phase and tokens, if ``bench`` has run.
        device: where they were measured.
    """

    run: str
    model: str
    method: str
    finetuned: bool
    ffn_sparsity: float
    ffn_flops: float
    kl: Interval
    kl_difference: Interval | None = None
    perplexity: float
    dense_perplexity: float
    nll_increase: Interval
    top1_agreement: Share
    tasks: dict[str, ComparedTask]
    active_parameters: int
    total_parameters: int
    model_bytes: int
    speedups: dict[str, float]
    device: str | None = None
