"""One section per stage: names, types, limits and defaults."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

DATA = (
    "builtin:calibration, a .jsonl/.json/.parquet/.txt/.raw file or folder, or hf:NAME; "
    "with :WEIGHT for a mixture. May be repeated."
)
DTYPE = "auto (as the dense model), float32, bfloat16 or float16."
WINDOW = "Tokens per window."
Runtime = Literal["transformers", "vllm", "llama.cpp"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change.

    Validators are built by the first use: the help of a command needs names and defaults only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class ModelConfig(Section):
    """The dense model: a local folder, a .gguf file, or a hub name."""

    path: str
    revision: str | None = Field(None, description="Hub revision.")
    trust_remote_code: bool = Field(False, description="Let the model's own code run.")
    dtype: DtypeName = Field(
        "auto",
        description="auto, float32, ...; float32 is faster on CPUs without 16-bit products.",
    )


class CalibrateConfig(Section):
    """Which text is run through the model, and which statistics are kept.

    ``activation_top_k``: K_a, neurons that a token marks (CMoE). ``input_sample_mb``: FFN inputs
    kept per layer, megabytes. ``sensitivity_tokens``: tokens of the backward pass that finds how
    much errors cost at each token; 0 weighs all alike.
    """

    data: tuple[str, ...] = Field(("builtin:calibration",), min_length=1, description=DATA)
    tokens: int = Field(32768, gt=0, description="Calibration tokens.")
    sequence_length: int = Field(512, gt=1, description=WINDOW)
    activation_top_k: int = Field(10, gt=0)
    input_sample_mb: float = Field(256.0, gt=0)
    sensitivity_tokens: int = Field(4096, ge=0)
    groups: bool = Field(
        False,
        description="Keep the groups of the data apart, as many tokens of each (for dive).",
    )


class RouterConfig(Section):
    """How the router is built and what makes up for skipped experts. ``None``: as the method does.

    ``shrinkage`` holds the candidates for the refit's pull toward the original weights.
    """

    kind: str | None = Field(
        None,
        description="mean-gate, representative, ridge, error-ridge or random; default: as method.",
    )
    refit: bool | None = Field(
        None, description="Re-solve the down projection; default: as the method."
    )
    constants: bool | None = Field(
        None, description="Supply the mean output of skipped experts; default: as the method."
    )
    shrinkage: tuple[PositiveFloat, ...] = Field((0.03, 0.1, 0.3, 1.0), min_length=1)


class PartitionConfig(Section):
    """How every FFN is split. ``None`` means the method's own default.

    ``weighting`` "softmax": the factors of a token's K experts are K times their shares of the
    softmax, as continued pretraining wants them.
    """

    method: str = Field(
        "weave",
        description="weave, expertweaver, cmoe, dive, flap, wanda-sp, random or weight-kmeans.",
    )
    sparsity: float = Field(
        0.25, gt=0, lt=1, description="Share of FFN neurons that a token skips."
    )
    num_experts: int | None = Field(
        None,
        gt=0,
        description="Slices of the FFN, shared ones included; of dive, its experts.",
    )
    expert_width_multiple: int = Field(
        1,
        gt=0,
        description=("Expert width is a multiple of this; the rest joins the shared expert."),
    )
    allocation: Literal["uniform", "adaptive", "fisher"] | None = Field(
        None, description="Active neurons per layer; default: as the method."
    )
    sequential: bool | None = Field(
        None,
        description="Profile each layer behind the converted ones in front; default: as the paper.",
    )
    weighting: Literal["softmax"] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class AssembleConfig(Section):
    """How the converted model is written.

    ``smoke_test`` is part of the file and not of the fingerprint, since the model that is written
    is the same with and without.
    """

    dtype: DtypeName = Field("auto", description=DTYPE)
    max_shard_size: str = Field("5GB", description="Such as 5GB or 500MB.")
    smoke_test: bool = Field(
        True,
        description="Compare it with the dense model on a few hundred tokens; default: yes.",
    )


class EvalConfig(Section):
    """Settings of the comparison with the dense model: text, tasks, router report and dtype."""

    data: tuple[str, ...] = Field(("builtin:held-out",), min_length=1, description=DATA)
    sequence_length: int = Field(2048, gt=1, description=WINDOW)
    windows: int | None = Field(14, gt=0, description="Windows, null for all of them.")
    tasks: tuple[str, ...] = Field(
        (),
        description="A .jsonl of {query, choices, gold} or {context, continuation}, HellaSwag's "
        ".txt.bz2, or harness:NAME. May be repeated.",
    )
    task_limit: int | None = Field(500, gt=0, description="Items per task.")
    include_path: str | None = Field(
        None, description="Folder with your own task files (YAML) for harness:NAME."
    )
    shots: int | None = Field(
        None, ge=0, description="Examples before every item of harness tasks; default: as the task."
    )
    router: bool = Field(
        False,
        description="Also report, per layer, how well the router agrees with the choice that knows "
        "the experts' outputs, and how much the split depends on the calibration text.",
    )
    dtype: DtypeName = Field("auto", description=DTYPE)


class BenchConfig(Section):
    """Which speeds are measured."""

    tokens: tuple[PositiveInt, ...] = Field(
        (1, 128, 512), description="Tokens in one forward, such as 1,128,512."
    )
    decode_tokens: int = Field(32, ge=0, description="Tokens decoded with a KV cache; 0 for none.")
    repeats: int = Field(10, gt=0, description="Timed rounds.")
    seconds: float = Field(
        120.0, gt=0.0, description="Budget, divided among the rows; a slow row gets fewer rounds."
    )
    warmup: int = Field(2, ge=0)
    dtype: DtypeName = Field("auto", description=DTYPE)
    threads: int | None = Field(None, gt=0, description="Threads of torch.")


class ExportConfig(Section):
    """How a converted model is written for other runtimes. No target: the best that fits."""

    target: str | None = Field(
        None,
        description="glm4-moe, granite-moe-shared, gguf or weaver; the best that fits if left out.",
    )
    approximate: bool = Field(
        False, description="Replace what the target cannot hold, and measure what it costs."
    )
    remote_code: bool = Field(
        False, description="Add code to a weaver export that runs without weaver."
    )
    quantisation: Literal["f32", "f16", "bf16", "q8_0"] | None = Field(
        None, description="GGUF type of the weights, f16 if left out."
    )
    dtype: DtypeName = Field("auto", description=DTYPE)
    max_shard_size: str = Field("5GB", description="Such as 5GB or 500MB.")


class VerifyConfig(Section):
    """On what an export is compared with the model it was made from."""

    data: tuple[str, ...] = Field(("builtin:held-out",), min_length=1, description=DATA)
    tokens: int = Field(4096, gt=1, description="Tokens to compare on.")
    sequence_length: int = Field(512, gt=16, description=WINDOW)
    new_tokens: int = Field(16, gt=0, description="Tokens that both write on from a prompt.")
    max_kl: float = Field(1e-3, gt=0, description="Fail above this KL, nats per token.")
    runtime: Runtime | None = Field(
        None, description="transformers, vllm or llama.cpp; llama.cpp for GGUF if left out."
    )
    dtype: DtypeName = Field("float32", description=DTYPE)
