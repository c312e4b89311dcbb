"""``weaver generate``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from weaver.cli.session import quiet_libraries
from weaver.config.sections import DtypeName
from weaver.errors import WeaverError
from weaver.report.tables import format_number, format_seconds
from weaver.report.terminal import make_console, printable

if TYPE_CHECKING:
    from weaver.stages.generate import Generated


def generate(
    model: Annotated[
        str, typer.Argument(help="Model folder, run directory, .gguf file or hub name.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most probable token, 1 draws one.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Nucleus probability (top-p). \\[default: 1]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sampling seed. \\[default: 0]")] = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Dtype of the weights; auto as stored.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Number of torch threads.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
) -> None:
    """Continue a prompt with a dense or a converted model.

    The text goes to standard output as it is made, without the prompt; speed and warnings go to
    standard error.
    """
    _refuse_without_drawing(temperature, top_p=top_p, seed=seed)
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    from weaver.evaluation.generation import Decoding
    from weaver.stages.bench import pinned_threads
    from weaver.stages.generate import generate as write

    quiet_libraries()
    decoding = Decoding(
        max_new_tokens, temperature, 1.0 if top_p is None else top_p, 0 if seed is None else seed
    )
    with pinned_threads(threads), _without_notices():
        written = write(
            model, text, decoding, on_text=_print_text, dtype=dtype, device=device, chat=chat
        )
    print(flush=True)
    _report(written, greedy=decoding.is_greedy)


def _refuse_without_drawing(temperature: float, **flags: float | None) -> None:
    """Flags that would do nothing are errors."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    if temperature == 0 and given:
        raise WeaverError(
            f"{', '.join(given)} would do nothing at temperature 0",
            why="the most probable token is taken, nothing is drawn",
            fix=f"--temperature 0.7, or leave {' and '.join(given)} out",
        )


@contextmanager
def _without_notices() -> Iterator[None]:
    """Which forward is chosen, and why, is said where speed matters, not between words."""
    logger = logging.getLogger("weaver.kernels.ops")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _print_text(text: str) -> None:
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def _report(written: Generated, *, greedy: bool) -> None:
    console = make_console(stderr=True, soft_wrap=True, highlight=False)
    rate = format_number(written.tokens / written.seconds)
    console.print(f"{written.tokens} tokens in {format_seconds(written.seconds)}, {rate} tokens/s")
    if written.problem is not None:
        advice = "--temperature 0.7 draws; " if greedy else ""
        console.print(
            f"[yellow]degenerate: {written.problem}[/yellow]; {advice}"
            "see whether the dense model does so too"
        )
