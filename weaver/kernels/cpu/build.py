"""Compiling the C++ kernel once per machine, and loading it.

The library is made for the processor it runs on (``-march=native``) and against the installed
torch, so its folder is named after both and after the source. It is built in a temporary folder
and renamed into place, and a lock lets only one process compile; what a killed one left behind is
removed by the next. A library is code: it is loaded only where nobody else can have written it, and
while it has the digest that was noted when it was built.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from subprocess import SubprocessError

import torch

from weaver.artifacts.cache import cache_folder, cache_lock, check_own, make_private
from weaver.artifacts.store import write_text
from weaver.kernels.machine import cpu_features

NAME = "weaver_cpu"
# Folders in which a library is being compiled.
BUILDING = "building-"
SOURCES = ("kernel.cpp", *sorted(path.name for path in Path(__file__).parent.glob("*.h")))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-Wno-psabi")

_log = logging.getLogger(__name__)


@cache
def is_available() -> bool:
    """Whether ``torch.ops.weaver_cpu`` can be called; compiles the kernel if it has to.

    Without a compiler the answer is no, and a warning says once what is slower and what to install.
    """
    library = compiled_kernel()
    try:
        if not _is_whole(library):
            _build(library)
        for path in (cache_folder(), library.parent, library):
            check_own(path)
        if not hasattr(torch.ops.weaver_cpu, "moe"):
            torch.ops.load_library(str(library))
    except PermissionError as error:
        _log.warning(
            "The CPU kernel is not used (%s). torch's own operations take its place and are "
            "slower. To get it: set WEAVER_CACHE to a folder that only you can write.",
            error,
        )
        return False
    except (OSError, RuntimeError, SubprocessError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning(
            "The CPU kernel could not be compiled (%s). torch's own operations take its place and "
            "are slower. To get it: install a C++ compiler (g++ or clang) and ninja.",
            next((line for line in lines if "error:" in line), lines[0]),
        )
        return False
    return True


def compiled_kernel() -> Path:
    """Path of the library for this source, torch and processor, compiled or not."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    for text in (torch.__version__, platform.machine(), cpu_features(), " ".join(FLAGS)):
        digest.update(text.encode() + b"\0")
    return cache_folder() / f"kernel-{digest.hexdigest()[:16]}" / f"{NAME}.so"


def _is_whole(library: Path) -> bool:
    """Whether the library is there as it was built: a damaged one would end the process."""
    try:
        with library.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        return _digest_file(library).read_text() == found
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _build(library: Path) -> None:
    # Slow to import, and not needed where the library is there.
    from torch.utils import cpp_extension

    with cache_lock("build"):
        if _is_whole(library):
            return
        for leftover in cache_folder().glob(f"{BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        _log.warning("Compiling the CPU kernel, once for this machine; it takes about a minute.")
        # at::parallel_for is OpenMP on Linux; the runtime is the one that torch has loaded.
        flags = [*FLAGS, "-fopenmp"] if sys.platform == "linux" else list(FLAGS)
        folders = tempfile.TemporaryDirectory(dir=cache_folder(), prefix=BUILDING)
        with folders as folder, _scripts_on_path():
            cpp_extension.load(
                NAME,
                [str(Path(__file__).parent / "kernel.cpp")],
                extra_cflags=flags,
                build_directory=folder,
                is_python_module=False,
            )
            make_private(library.parent)
            built = Path(folder) / f"{NAME}.so"
            built.chmod(0o700)
            digest = hashlib.sha256(built.read_bytes()).hexdigest()
            os.replace(built, library)
            write_text(_digest_file(library), digest)


@contextmanager
def _scripts_on_path() -> Iterator[None]:
    """The environment's own programs, ninja among them, even where it was not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before
