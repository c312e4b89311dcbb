"""The ``weaver`` program: its subcommands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from weaver.cli import (
    assemble,
    bench,
    build_router,
    calibrate,
    compare,
    convert,
    evaluate,
    export,
    finetune,
    generate,
    inspect,
    pareto,
    partition,
    push,
    report,
    run,
    sweep,
    verify,
)
from weaver.cli.session import is_follower
from weaver.errors import WeaverError
from weaver.report.terminal import make_console

# Signals that end a command as Ctrl-C does, and what it is then told. The exit code is that of a
# shell: 128 and the number of the signal.
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class WeaverGroup(TyperGroup):
    """Turns ``WeaverError`` into three lines and exit code 1; usage errors keep exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the subcommand; ``bench --level layer`` is ``bench-layer``, for scripts."""
        if args[:1] == ["bench"] and any(arg.split("=")[0] == "--level" for arg in args):
            args = ["bench-layer", *args[1:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        console = make_console(stderr=True, soft_wrap=True)
        interruption = _Interruption()
        try:
            return super().invoke(ctx)
        except WeaverError as error:
            if ctx.params.get("debug"):
                raise
            if not is_follower(ctx.invoked_subcommand or ""):
                _print_error(console, error)
            raise typer.Exit(1) from error
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, BrokenPipeError):
                raise  # whoever reads has had enough; click ends without a word
            if isinstance(error, OSError) and interruption.signal is None:
                _print_error(console, _os_error(error))
                raise typer.Exit(1) from error
            number = interruption.signal
            if number is None and isinstance(error, KeyboardInterrupt):
                number = signal.SIGINT
            if number is None:
                raise
            _print_error(
                console,
                WeaverError(
                    "interrupted",
                    why=f"{SIGNALS[number]}; finished layers and stages are kept",
                    fix="rerun the same command to go on",
                ),
            )
            raise typer.Exit(128 + number) from error


class _Interruption:
    """Remembers a signal: native code that is interrupted may raise an error of its own instead.

    torch was seen to raise a ``ValueError`` about a storage's shape in place of
    ``KeyboardInterrupt``. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for each in SIGNALS:
            if signal.getsignal(each) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(each, self._note)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signal = signal.Signals(signum)
        raise KeyboardInterrupt


def _os_error(error: OSError) -> WeaverError:
    """A file that could not be read or written, where nobody knew more about it."""
    where = error.filename if isinstance(error.filename, str) else "the output"
    return WeaverError(
        f"{where[:200]}: cannot be read or written",
        why=error.strerror or str(error) or type(error).__name__,
        fix="check the name, the rights and the free space, then rerun the same command",
    )


def _print_error(console: Console, error: WeaverError) -> None:
    console.print(f"[red]error:[/red] {_escape(error.what)}", highlight=False)
    console.print(f"  why: {_escape(error.why)}", highlight=False)
    console.print(f"  fix: {_escape(error.fix)}", highlight=False)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


app = typer.Typer(
    cls=WeaverGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn dense GLU language models into Mixture-of-Experts models, without training.",
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(version("weaver-moe"))
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn dense GLU language models into Mixture-of-Experts models, without training."""


# Groups of the help, in its order, with their subcommands.
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Stages": {
        "calibrate": calibrate.calibrate,
        "partition": partition.partition,
        "build-router": build_router.build_router,
        "assemble": assemble.assemble,
        "finetune": finetune.finetune,
        "eval": evaluate.evaluate,
        "bench": bench.bench,
    },
    "From start to end": {
        "convert": convert.convert,
        "run": run.run,
        "sweep": sweep.sweep,
    },
    "Converted models": {
        "generate": generate.generate,
        "export": export.export,
        "verify": verify.verify,
        "compare": compare.compare,
        "report": report.report,
        "inspect": inspect.inspect,
        "push": push.push,
    },
    "Before deciding": {"pareto": pareto.pareto, "bench-layer": bench.bench_layer},
}
for _group, _commands in GROUPS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(_command)


def main() -> None:
    """Entry point of the ``weaver`` command."""
    try:
        app(prog_name="weaver", standalone_mode=True)
    except KeyboardInterrupt:
        # While typer builds the commands: a command handles its own interruption.
        print("interrupted before anything was begun", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        _output_failed(error)
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            _output_failed(error)


def _output_failed(error: OSError) -> None:
    """End with an error where nothing more can be printed, as on a full disk."""
    # What is left in the buffer would fail once more when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        sys.exit(1)
    _print_error(make_console(stderr=True, soft_wrap=True), _os_error(error))
    sys.exit(1)
