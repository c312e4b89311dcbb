"""Triton's interpreter for one launch, so that kernels can be checked without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction


def interpret(kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
    """Run a kernel on CPU tensors, program after program, with numpy.

    The usual switch, ``TRITON_INTERPRET``, has to be set before anything in the process imports
    Triton, and rules out compiling in that process. This one works at any time, and leaves nothing
    behind. It relies on names that Triton does not document, of release 3.7.
    """
    # The interpreter drops what the kernel does not know; a compiled kernel refuses it.
    assert set(arguments) <= set(kernel.arg_names), set(arguments) - set(kernel.arg_names)
    with _interpreting():
        InterpretedFunction(kernel.fn)[grid](**arguments)


@contextmanager
def _interpreting() -> Iterator[None]:
    """Calls of functions under ``triton.jit`` run them, those in ``triton.language`` included."""
    call = JITFunction.__call__
    # Launching patches the modules that the kernel sees; nested calls patch more of them and do not
    # undo it. So all of them are patched here first, which go by what ``interpret`` can see.
    assert core is tl.core
    scope = _patch_lang(interpret)
    JITFunction.__call__ = _call_interpreted
    try:
        yield
    finally:
        JITFunction.__call__ = call
        scope.restore()


def _call_interpreted(function: Any, *arguments: Any, **named: Any) -> Any:
    # Not by calling the interpreted function, which would patch the modules each time.
    return InterpretedFunction(function.fn).rewrite()(*arguments, **named)
