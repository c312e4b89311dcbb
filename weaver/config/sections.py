"""One section per stage: names, types, limits and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The dense model: a local folder, a .gguf file, or a hub name."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DtypeName = "auto"


class CalibrateConfig(Section):
    """Which text is run through the model, and which statistics are kept.

    ``groups``: the groups of the data are kept apart, with as many tokens of each, and statistics
    of each are kept too.
    """

    data: tuple[str, ...] = Field(("builtin:calibration",), min_length=1)
    tokens: int = Field(32768, gt=0)
    sequence_length: int = Field(512, gt=1)
    activation_top_k: int = Field(10, gt=0)
    input_sample_mb: float = Field(256.0, gt=0)
    groups: bool = False


class RouterConfig(Section):
    """How the router is built and what makes up for skipped experts. ``None``: as the method does.

    ``refit`` re-solves the down projection, ``constants`` supplies the mean output of skipped
    experts, ``shrinkage`` holds the candidates for the refit's pull toward the original weights.
    """

    kind: str | None = None
    refit: bool | None = None
    constants: bool | None = None
    shrinkage: tuple[PositiveFloat, ...] = Field((0.03, 0.1, 0.3, 1.0), min_length=1)


class PartitionConfig(Section):
    """How every FFN is split. ``None`` means the method's own default.

    ``propagate`` is the router of the layers in front, when layers are split sequentially; it is
    set to the ``router`` section, so that they route as the converted model will. ``weighting``
    "softmax": the factors of a token's K experts are K times their shares of the softmax, as
    continued pretraining wants them.
    """

    method: str = "weave"
    sparsity: float = Field(0.25, gt=0, lt=1)
    num_experts: int | None = Field(None, gt=0)
    expert_width_multiple: int = Field(1, gt=0)
    allocation: Literal["uniform", "adaptive", "fisher"] | None = None
    sequential: bool | None = None
    weighting: Literal["softmax"] | None = None
    propagate: RouterConfig | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class AssembleConfig(Section):
    """How the converted model is written.

    ``smoke_test``: try it on a few hundred tokens afterwards. It is part of the file and not of the
    fingerprint, since the model that is written is the same with and without.
    """

    dtype: DtypeName = "auto"
    max_shard_size: str = "5GB"
    smoke_test: bool = True


class EvalConfig(Section):
    """Settings of the comparison with the dense model: text, tasks, router report and dtype."""

    data: tuple[str, ...] = Field(("builtin:held-out",), min_length=1)
    sequence_length: int = Field(2048, gt=1)
    windows: int | None = Field(14, gt=0)
    tasks: tuple[str, ...] = ()
    task_limit: int | None = Field(500, gt=0)
    router: bool = False
    dtype: DtypeName = "auto"


class BenchConfig(Section):
    """Which speeds are measured."""

    tokens: tuple[PositiveInt, ...] = (1, 128, 512)
    decode_tokens: int = Field(32, ge=0)
    repeats: int = Field(10, gt=0)
    warmup: int = Field(2, ge=0)
    dtype: DtypeName = "auto"
    threads: int | None = Field(None, gt=0)


class ExportConfig(Section):
    """How a converted model is written for other runtimes. No target: the best that fits.

    ``quantisation`` is of GGUF alone, f16 if left out.
    """

    target: str | None = None
    approximate: bool = False
    remote_code: bool = False
    quantisation: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    dtype: DtypeName = "auto"
    max_shard_size: str = "5GB"


class VerifyConfig(Section):
    """On what an export is compared with the model it was made from."""

    data: tuple[str, ...] = Field(("builtin:held-out",), min_length=1)
    tokens: int = Field(4096, gt=1)
    sequence_length: int = Field(512, gt=16)
    new_tokens: int = Field(16, gt=0)
    max_kl: float = Field(1e-3, gt=0)
    dtype: DtypeName = "float32"
