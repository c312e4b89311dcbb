"""Types of the results that ``bench`` writes to ``results.json``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from weaver.artifacts.results import Record

Milliseconds = Annotated[float, Field(gt=0.0)]
FfnLevel = Literal["layer", "kernel"]
BenchLevel = Literal["model"] | FfnLevel
BenchRouting = Literal["real", "uniform", "skewed"]


class BenchHeader(Record):
    """Where the times were taken.

    Args:
        device: name of the processor or GPU.
        threads: threads of torch.
        dtype: dtype of the models or layers.
        versions: package versions that took part.
        level: what was timed: whole models, one FFN with its router, or one FFN without it.
        routing: where routing came from: text (real), or random inputs that spread evenly over the
            experts or are drawn to few of them.
        clock_mhz: clock of the processor before the measurement; None if unknown.
        peak_memory_bytes: peak of the process, both models or layers included; None if unknown.
    """

    device: str
    threads: int = Field(gt=0)
    dtype: str
    versions: dict[str, str] = Field(default_factory=dict)
    level: BenchLevel = "model"
    routing: BenchRouting = "real"
    clock_mhz: float | None = None
    peak_memory_bytes: int | None = None


class BenchRow(Record):
    """Dense against converted at one size, in medians of interleaved runs.

    Args:
        tokens: tokens per forward (prefill) or generated one by one (decode).
        phase: prefill or decode.
        dense_ms, moe_ms: median milliseconds; ``*_p10_ms`` and ``*_p90_ms`` the spread.
        speedup: median over the rounds of dense over converted; below 1 the latter is slower.
        bound: ceiling of the speed-up, from what has to be computed or, for few tokens, read.
        bound_share: ``speedup / bound``.
        dense_tokens_per_second, moe_tokens_per_second: tokens over the median time.
        layer: index of the layer in the model.
        dense_variant: the fastest way to compute the dense FFN, which ``dense_ms`` is of.
        path: how the converted FFN was computed.
        grouped_mm_ms: the same FFN with transformers' ``grouped_mm`` experts.
        routing_ms: the router alone.
        relative_error: norm of the output's error against float64 over the norm of the output.

    The last six are of single FFNs; None where they were not measured.
    """

    tokens: int = Field(gt=0)
    phase: Literal["prefill", "decode"]
    dense_ms: Milliseconds
    dense_p10_ms: Milliseconds
    dense_p90_ms: Milliseconds
    moe_ms: Milliseconds
    moe_p10_ms: Milliseconds
    moe_p90_ms: Milliseconds
    speedup: float = Field(gt=0.0)
    bound: float = Field(gt=0.0)
    bound_share: float = Field(gt=0.0)
    dense_tokens_per_second: float = Field(gt=0.0)
    moe_tokens_per_second: float = Field(gt=0.0)
    layer: int | None = None
    dense_variant: str | None = None
    path: str | None = None
    grouped_mm_ms: Milliseconds | None = None
    routing_ms: Milliseconds | None = None
    relative_error: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("dense", "moe"):
            low, middle, high = (getattr(self, f"{name}_{q}ms") for q in ("p10_", "", "p90_"))
            if not low <= middle <= high:
                raise ValueError(f"{name} times are not ordered: {low}, {middle}, {high}")
        return self


class BenchResult(Record):
    """All rows of one benchmark and where they were taken."""

    header: BenchHeader
    rows: tuple[BenchRow, ...]

    def flat_rows(self) -> list[dict[str, Any]]:
        """One plain dict per row with the header's values in it: ``bench/results.json``."""
        header = self.header.model_dump()
        return [{**row.model_dump(), **header} for row in self.rows]

    @classmethod
    def from_flat_rows(cls, rows: list[dict[str, Any]]) -> Self:
        """Inverse of ``flat_rows``.

        Raises:
            ValueError: there is no row, or the rows were not taken in the same place.
        """
        names = set(BenchHeader.model_fields)
        headers = [{k: v for k, v in row.items() if k in names} for row in rows]
        if not rows or any(header != headers[0] for header in headers):
            raise ValueError("bench rows need one common header")
        values = [{k: v for k, v in row.items() if k not in names} for row in rows]
        return cls.model_validate({"header": headers[0], "rows": values})
