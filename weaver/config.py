"""The configuration of every stage, validated at the edge.

One YAML file describes a whole conversion; each section is one stage. A section's resolved values
are part of the stage's fingerprint, so everything that changes a result stands here and nothing
else does (progress bars, thread counts and the like are not configuration). The one exception is
``assemble.smoke_test``, which a run file has to be able to switch off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from weaver.errors import WeaverError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """The dense model: a local folder, a .gguf file, or a hub name."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: DtypeName = "auto"


class CalibrateConfig(Section):
    """Which text is run through the model, and which statistics are kept."""

    data: tuple[str, ...] = Field(("builtin:calibration",), min_length=1)
    tokens: int = Field(32768, gt=0)
    sequence_length: int = Field(512, gt=1)
    activation_top_k: int = Field(10, gt=0)
    input_sample_mb: float = Field(256.0, gt=0)


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
    set to the ``router`` section, so that they route as the converted model will.
    """

    method: str = "weave"
    sparsity: float = Field(0.25, gt=0, lt=1)
    num_experts: int | None = Field(None, gt=0)
    expert_width_multiple: int = Field(1, gt=0)
    allocation: Literal["uniform", "adaptive", "fisher"] | None = None
    sequential: bool | None = None
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


class FinetuneConfig(Section):
    """A short fine-tuning of the converted model."""

    data: tuple[str, ...] = Field(("builtin:calibration",), min_length=1)
    trainable: Literal["all", "router"] = "all"
    steps: int = Field(50, gt=0)
    batch_size: int = Field(4, gt=0)
    sequence_length: int = Field(256, gt=1)
    learning_rate: float = Field(2e-5, gt=0)
    router_scale_learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    balance_update: float = Field(1e-3, ge=0)
    checkpoint_every: int = Field(10, gt=0)


class EvalConfig(Section):
    """What is measured on the converted model, next to the dense one."""

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


class RunConfig(Section):
    """A whole conversion. ``finetune`` is left out unless the section is present."""

    model: ModelConfig
    seed: int = 0
    calibrate: CalibrateConfig = CalibrateConfig()
    partition: PartitionConfig = PartitionConfig()
    router: RouterConfig = RouterConfig()
    assemble: AssembleConfig = AssembleConfig()
    finetune: FinetuneConfig | None = None
    eval: EvalConfig = EvalConfig()
    bench: BenchConfig = BenchConfig()


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        WeaverError: the file is missing or not YAML, an override has no ``=``, or a value is not
            what the section allows.
    """
    return parse_config(RunConfig, _read_yaml(path, overrides), source=str(path))


def load_section(
    section: type[S],
    name: str,
    path: Path | None,
    overrides: Sequence[str],
    flags: dict[str, Any],
) -> S:
    """One section of a configuration: defaults, then the file, then overrides, then flags.

    Args:
        section: its type.
        name: its key in the file.
        path: a YAML file, or None.
        overrides: ``section.key=value`` texts; the values of other sections are not looked at.
        flags: values of command-line flags; None means not given.

    Raises:
        WeaverError: as ``load_run_config``.
    """
    file = _read_yaml(path, overrides)
    _check_sections(file, path)
    raw = file.get(name) or {}
    if not isinstance(raw, dict):
        raise WeaverError(
            f"{path or name}: section {name} is a {type(raw).__name__}, not a mapping",
            why=f"known keys are {', '.join(section.model_fields)}",
            fix=f"write {name}: and indented key: value lines",
        )
    given = {key: value for key, value in flags.items() if value is not None}
    return parse_config(section, {**raw, **given}, source=str(path or f"{name} flags"))


def load_seed(path: Path | None, overrides: Sequence[str], flag: int | None) -> int:
    """The seed: the flag, else an override's, else the file's, else 0.

    Raises:
        WeaverError: it is not a whole number.
    """
    seed = _read_yaml(path, overrides).get("seed", 0) if flag is None else flag
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise WeaverError(
            f"seed {seed!r} is not a whole number",
            why="the seed is the root of all randomness",
            fix="--seed 0",
        )
    return seed


def _read_yaml(path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    raw: Any = {}
    if path is not None:
        if not path.is_file():
            raise WeaverError(
                f"{path}: no such config file",
                why="a run is described by one YAML file",
                fix="weaver run configs/demo.yaml --run-dir runs/demo",
            )
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise WeaverError(
                f"{path}: not valid YAML", why=str(error), fix=f"mend {path}"
            ) from error
    if not isinstance(raw, dict):
        raise WeaverError(
            f"{path}: holds a {type(raw).__name__}, not sections",
            why="the top level is a mapping with the keys model, calibrate, partition, ...",
            fix="start from configs/demo.yaml",
        )
    _expand_model(raw)
    for override in overrides:
        _apply_override(raw, override)
        _expand_model(raw)
    return raw


def _expand_model(raw: dict[str, Any]) -> None:
    """``model: NAME`` is short for ``model: {path: NAME}``."""
    if isinstance(raw.get("model"), str):
        raw["model"] = {"path": raw["model"]}


def _check_sections(raw: dict[str, Any], path: Path | None) -> None:
    unknown = ", ".join(sorted(str(key) for key in raw.keys() - RunConfig.model_fields.keys()))
    if unknown:
        raise WeaverError(
            f"{path or 'overrides'}: no section is called {unknown}",
            why=f"known sections are {', '.join(RunConfig.model_fields)}",
            fix="change or remove the named keys",
        )


def parse_config(section: type[S], values: dict[str, Any], *, source: str) -> S:
    """Validate a mapping as a config section.

    Raises:
        WeaverError: naming every value that does not fit.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or section.__name__}: {item['msg']}"
            for item in error.errors()
        )
        raise WeaverError(
            f"{source}: {problems}",
            why=f"known keys are {', '.join(section.model_fields)}",
            fix="change or remove the named keys",
        ) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator:
        raise WeaverError(
            f"override {override!r} has no '='",
            why="an override is section.key=value",
            fix="--set partition.sparsity=0.5",
        )
    *sections, key = dotted.split(".")
    target = raw
    for name in sections:
        child = target.get(name)
        if not isinstance(child, dict):
            child = target[name] = {}
        target = child
    try:
        target[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise WeaverError(
            f"override {override!r}: the value is not YAML",
            why=" ".join(str(error).split()),
            fix="quote the value, as in --set 'partition.options={name: 1}'",
        ) from error
