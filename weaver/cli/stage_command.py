"""Subcommands made from sections of the configuration: their fields become flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from weaver.cli import options
from weaver.cli.session import Output, make_context, run_stage
from weaver.config.loading import load_device, load_model_section, load_section, load_seed
from weaver.config.sections import ModelConfig, Section

if TYPE_CHECKING:
    from weaver.artifacts.manifest import StageManifest
    from weaver.rundir.stage_run import StageContext

S = TypeVar("S", bound=Section)
# As in weaver.stages.pipeline, which imports torch; help, which evaluates signatures, must not.
StageCall = Callable[["StageContext"], "StageManifest"]


# The options that commands share, in the order of their help: annotation and default.
SHARED: dict[str, tuple[Any, Any]] = {
    "run_dir": (options.RunDir, inspect.Parameter.empty),
    "config": (options.ConfigFile, None),
    "overrides": (options.Overrides, None),
    "seed": (options.Seed, None),
    "device": (options.Device, None),
    "force": (options.Force, False),
    "dry_run": (options.DryRun, False),
    "data_dir": (options.DataDir, None),
    "trust_remote_code": (options.TrustRemoteCode, False),
    "quiet": (options.Quiet, False),
    "as_json": (options.AsJson, False),
}
OF_STAGES = (
    *("run_dir", "config", "overrides", "seed", "device", "force", "dry_run"),
    *("trust_remote_code", "quiet", "as_json"),
)


@dataclass(frozen=True)
class SharedOptions:
    """Values of the options in ``SHARED``; those that a command lacks keep their default.

    A command that lacks ``--device`` computes on the CPU.
    """

    run_dir: Path = Path()
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    seed: int | None = None
    device: str | None = "cpu"
    force: bool = False
    dry_run: bool = False
    data_dir: Path | None = None
    trust_remote_code: bool = False
    quiet: bool = False
    as_json: bool = False

    @property
    def output(self) -> Output:
        """How the command prints."""
        return Output(self.quiet, self.as_json)

    def section(self, section: type[S], name: str, flags: Mapping[str, Any] | None = None) -> S:
        """A section of the file, overrides and flags; see ``load_section``."""
        return load_section(section, name, self.config, self.overrides, dict(flags or {}))

    def model(self, flags: Mapping[str, Any]) -> ModelConfig:
        """The section of the dense model; see ``load_model_section``."""
        return load_model_section(self.config, self.overrides, dict(flags))

    def context(self, run_dir: Path | None = None) -> StageContext:
        """The context of a stage, in a run directory that is an argument instead of an option."""
        return make_context(
            run_dir or self.run_dir,
            self.output,
            seed=load_seed(self.config, self.overrides, self.seed),
            force=self.force,
            dry_run=self.dry_run,
            data_dir=self.data_dir,
            trust_remote_code=self.trust_remote_code,
            device=load_device(self.config, self.overrides, self.device),
        )


def section_command(
    key: str,
    section: type[Section],
    flags: Sequence[str],
    *,
    spelled: Mapping[str, str] | None = None,
    shared: Sequence[str] = OF_STAGES,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a subcommand that is set by a section of the configuration.

    The function takes the validated section, the ``SharedOptions``, and by keyword parameters of
    its own, written as typer's are.

    Args:
        key: of the section in a file.
        section: its type.
        flags: fields that are flags.
        spelled: declarations of flags that are not called as their fields.
        shared: names in ``SHARED``.
    """
    declarations = spelled or {}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        own = [each for each in parameters if each.kind == each.KEYWORD_ONLY]

        def command(**values: Any) -> None:
            given = {field: values.pop(field) for field in flags}
            common = {name: values.pop(name) for name in shared}
            if "overrides" in common:
                common["overrides"] = tuple(common["overrides"] or ())
            chosen = SharedOptions(**common)
            function(chosen.section(section, key, given), chosen, **values)

        shown = {name: _parameter(name, *SHARED[name]) for name in shared}
        signature = [
            *(shown.pop(name) for name in ("run_dir",) if name in shown),
            *(parameter for parameter in own if _is_argument(parameter)),
            *(section_flag(section, field, declarations.get(field, "")) for field in flags),
            *(parameter for parameter in own if not _is_argument(parameter)),
            *shown.values(),
        ]
        command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        command.__annotations__ = {}
        command.__doc__ = function.__doc__
        return command

    return decorate


def stage_command(
    stage: str,
    section: type[Section],
    flags: Sequence[str],
    *,
    key: str | None = None,
    spelled: Mapping[str, str] | None = None,
    reads_text: bool = False,
) -> Callable[[Callable[..., StageCall]], Callable[..., None]]:
    """Make a function that returns the call of a stage its subcommand; see ``section_command``.

    Args:
        stage: its name.
        section, flags, spelled: see ``section_command``.
        key: of the section in a file; default: the stage's name.
        reads_text: whether ``--data-dir`` says where data files lie.
    """
    shared = (*OF_STAGES, "data_dir") if reads_text else OF_STAGES

    def decorate(function: Callable[..., StageCall]) -> Callable[..., None]:
        @wraps(function)
        def run(settings: Section, chosen: SharedOptions, **own: Any) -> None:
            call = function(settings, chosen, **own)
            run_stage(chosen.context(), chosen.output, stage, call)

        return section_command(key or stage, section, flags, spelled=spelled, shared=shared)(run)

    return decorate


def section_flag(section: type[Section], field: str, spelled: str = "") -> inspect.Parameter:
    """The flag of a field: its type, its description as help, its default in the help's text.

    Args:
        section: of the configuration.
        field: its name there.
        spelled: declaration of the flag; default: the field's name, for truth values with a "no".
    """
    info = section.model_fields[field]
    assert info.description, f"{section.__name__}.{field} is a flag and has no description"
    name = "--" + field.replace("_", "-")
    kind = _flag_type(info.annotation)
    if not spelled:
        spelled = f"{name}/--no-{name[2:]}" if kind is bool else name
    default = info.get_default()
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    # A bracket alone would be markup of rich's.
    known = rf" \[default: {shown}]" if default is not None and shown and kind is not bool else ""
    option = typer.Option(
        spelled,
        parser=_split if kind is list else None,
        help=f"{info.description}{known}",
        metavar=_choices(info.annotation),
    )
    shape = str if kind is list else kind
    return _parameter(field, Annotated[shape | None, option], None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _is_argument(parameter: inspect.Parameter) -> bool:
    return any(
        isinstance(each, typer.models.ArgumentInfo) for each in get_args(parameter.annotation)
    )


def _flag_type(annotation: Any) -> Any:
    """The type of a flag: of several texts a flag that repeats, of several numbers one ``list``."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return _flag_type(next(each for each in inner if each is not NoneType))
    if origin is Annotated:
        return _flag_type(inner[0])
    if origin is Literal:
        return str
    if origin is tuple:
        return list[str] if _flag_type(inner[0]) is str else list
    return annotation


def _split(text: str) -> list[str]:
    return text.split(",")


def _choices(annotation: Any) -> str | None:
    """The values of a Literal, for the help."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    return next(filter(None, map(_choices, get_args(annotation))), None)
