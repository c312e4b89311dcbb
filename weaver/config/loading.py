"""From a YAML file, overrides and flags to validated sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from weaver.config.finetuning import FinetuneConfig
from weaver.config.sections import (
    AssembleConfig,
    BenchConfig,
    CalibrateConfig,
    EvalConfig,
    ModelConfig,
    PartitionConfig,
    RouterConfig,
    Section,
)
from weaver.errors import WeaverError, shell

S = TypeVar("S", bound=Section)
# No run file comes near it.
MAX_YAML_BYTES = 2**20


class RunConfig(Section):
    """A whole conversion. ``finetune`` is left out unless the section is present."""

    model: ModelConfig
    seed: int = 0
    device: str = "auto"
    calibrate: CalibrateConfig = CalibrateConfig()
    partition: PartitionConfig = PartitionConfig()
    router: RouterConfig = RouterConfig()
    assemble: AssembleConfig = AssembleConfig()
    finetune: FinetuneConfig | None = None
    eval: EvalConfig = EvalConfig()
    bench: BenchConfig = BenchConfig()


def load_run_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int | None = None,
) -> RunConfig:
    """A whole configuration: defaults, then the file, then overrides, then values.

    Args:
        path: a YAML file, or None.
        overrides: ``section.key=value`` texts (values are YAML).
        values: by section; None means not given.
        seed: None means not given.

    Raises:
        WeaverError: the file is missing or not YAML, an override has no ``=``, or a value is not
            what the section allows.
    """
    raw = merge_sections(read_yaml(path, overrides), values or {})
    if seed is not None:
        raw["seed"] = seed
    return parse_config(RunConfig, raw, source=str(path or "flags"))


def merge_sections(
    below: Mapping[str, Any], above: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Lay values over a configuration, section by section; None means not given.

    What is no section below is left as it is, for ``parse_config`` to refuse.
    """
    merged = dict(below)
    for name, section in above.items():
        given = {key: value for key, value in section.items() if value is not None}
        before = merged.get(name) or {}
        if given and isinstance(before, Mapping):
            merged[name] = {**before, **given}
    return merged


def load_model_section(
    path: Path | None, overrides: Sequence[str], flags: dict[str, Any]
) -> ModelConfig:
    """The section of the dense model; see ``load_section``.

    Raises:
        WeaverError: as ``load_section``; no model is named.
    """
    section = read_yaml(path, overrides).get("model") or {}
    if flags["path"] is None and isinstance(section, dict) and "path" not in section:
        raise WeaverError(
            "no model is named",
            why="calibrate runs text through a dense model",
            fix="weaver calibrate MODEL, or a --config with a model section",
        )
    return load_section(ModelConfig, "model", path, overrides, flags)


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
    file = read_yaml(path, overrides)
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
    seed = read_yaml(path, overrides).get("seed", 0) if flag is None else flag
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise WeaverError(
            f"seed {seed!r} is not a whole number",
            why="the seed is the root of all randomness",
            fix="--seed 0",
        )
    return seed


def load_device(path: Path | None, overrides: Sequence[str], flag: str | None) -> str:
    """The name of the device: the flag, else an override's, else the file's, else ``auto``.

    Raises:
        WeaverError: it is not a text.
    """
    device = read_yaml(path, overrides).get("device", "auto") if flag is None else flag
    if not isinstance(device, str):
        raise WeaverError(
            f"device {device!r} is not a text",
            why="a device is auto, cpu, cuda or cuda:N",
            fix="--device auto",
        )
    return device


def read_yaml(path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file, under overrides; see ``load_run_config``."""
    raw: Any = {}
    if path is not None:
        if not path.is_file():
            raise WeaverError(
                f"{path}: no such config file",
                why="a run is described by one YAML file",
                fix="name an existing file; weaver convert MODEL RUN_DIR needs none",
            )
        try:
            raw = _parse_yaml(path.read_text(encoding="utf-8")) or {}
        except ValueError as error:
            raise WeaverError(
                f"{path}: not valid YAML", why=str(error), fix=f"mend {shell(path)}"
            ) from error
    if not isinstance(raw, dict):
        raise WeaverError(
            f"{path}: holds a {type(raw).__name__}, not sections",
            why="the top level is a mapping with the keys model, calibrate, partition, ...",
            fix="write sections, such as model: and below it path: NAME",
        )
    _expand_model(raw)
    for override in overrides:
        _apply_override(raw, override)
        _expand_model(raw)
    return raw


def _parse_yaml(text: str) -> Any:
    """Parse YAML of which nothing is known.

    Raises:
        ValueError: it is not YAML, nested too deeply, or holds a value that only looks like one of
            its types, such as the timestamp 2024-13-45 and the number 0x; or half of a surrogate
            pair.
    """
    try:
        value = yaml.safe_load(text)
        # Nested lists that are shared, which a few lines of aliases make billions of, end here too.
        if len(yaml.safe_dump(value, allow_unicode=True).encode()) > MAX_YAML_BYTES:
            raise ValueError(f"more than {MAX_YAML_BYTES} bytes")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # The library raises whatever its constructors trip over.
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return value


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
        problems = [_problem(section, item) for item in error.errors()]
        unknown = [keys for _, keys in problems if keys]
        raise WeaverError(
            f"{source}: {'; '.join(text for text, _ in problems)}",
            why=f"known keys are {', '.join(unknown[0])}"
            if unknown
            else "every value is checked before any work is done",
            fix="change or remove the named keys" if unknown else "give the named keys such values",
        ) from error


def _problem(section: type[Section], item: Any) -> tuple[str, list[str]]:
    """One of pydantic's errors as text, and the known keys beside a key that is not known."""
    *outer, last = item["loc"] or (section.__name__,)
    text = f"{'.'.join(str(part) for part in (*outer, last))}: {item['msg']}"
    if item["type"] != "extra_forbidden":
        return text, []
    known = _keys_below(section, outer)
    close = get_close_matches(str(last), known, n=1)
    return text + (f", did you mean {close[0]}?" if close else ""), known


def _keys_below(section: type[Section], path: Sequence[str | int]) -> list[str]:
    """Keys of the section that a path leads to; none where it is no section."""
    for name in path:
        if isinstance(name, int):
            continue
        field = section.model_fields.get(name)
        inner = None if field is None else _section_in(field.annotation)
        if inner is None:
            return []
        section = inner
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section in a field's type, such as ``FinetuneConfig | None``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


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
        target[key] = _parse_yaml(value)
    except ValueError as error:
        raise WeaverError(
            f"override {override!r}: the value is not YAML",
            why=" ".join(str(error).split()),
            fix="quote the value, as in --set 'partition.options={name: 1}'",
        ) from error
