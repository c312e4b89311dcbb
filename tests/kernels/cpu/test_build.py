"""Where the compiled kernel lies, who compiles it, and what happens without a compiler."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_kernel import require_native
from torch.utils import cpp_extension

from weaver.kernels.cpu import build
from weaver.kernels.cpu.build import compiled_kernel


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WEAVER_CACHE", str(tmp_path))
    build.is_available.cache_clear()
    yield tmp_path
    build.is_available.cache_clear()


def test_a_machine_without_a_compiler_is_told_once_and_goes_on(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions\nand more")

    monkeypatch.setattr(cpp_extension, "load", fail)
    with caplog.at_level(logging.WARNING):
        assert [build.is_available(), build.is_available()] == [False, False]
    compiling, failed = (record.getMessage() for record in caplog.records)
    assert compiling.startswith("Compiling the CPU kernel")
    assert "(Ninja is required to load C++ extensions)" in failed
    assert "install a C++ compiler (g++ or clang) and ninja" in failed
    assert [path.name for path in empty_cache.iterdir()] == ["build.lock"]


def test_a_finished_build_is_renamed_into_place(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(name: str, sources: list[str], build_directory: str, **named: Any) -> None:
        calls.append(named["extra_cflags"])
        assert Path(sources[0]).is_file()
        (Path(build_directory) / f"{name}.so").write_text("library")

    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(torch.ops, "load_library", calls.append)
    library = compiled_kernel()
    build._build(library)
    assert library.read_text() == "library"
    assert library.is_relative_to(empty_cache)
    assert sorted(path.name for path in empty_cache.iterdir()) == [
        "build.lock",
        library.parent.name,
    ]
    # Another process that waited for the lock finds it there.
    build._build(library)
    assert len(calls) == 1
    assert "-march=native" in calls[0]


def test_another_processor_or_torch_has_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    here = compiled_kernel()
    assert compiled_kernel() == here
    with monkeypatch.context() as patched:
        patched.setattr(build, "cpu_features", lambda: "fpu sse")
        assert compiled_kernel() != here
    monkeypatch.setattr(torch, "__version__", "2.0")
    assert compiled_kernel() != here


ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")


def for_processor(name: str) -> list[str]:
    """The compiler's flags for a named processor instead of this one."""
    return [f"-march={name}" if "march" in flag else flag for flag in build.FLAGS]


@ON_X86
@pytest.mark.parametrize("processor", ["sapphirerapids", "x86-64"])
def test_the_source_is_c_plus_plus_17_for_new_and_old_processors(processor: str) -> None:
    """The standard that the oldest allowed torch asks for; with every path, and with none."""
    require_native()
    source = Path(build.__file__).with_name("kernel.cpp")
    include = [f"-I{path}" for path in cpp_extension.include_paths()]
    command = [cpp_extension.get_cxx_compiler(), "-std=c++17", "-fopenmp", "-fsyntax-only"]
    subprocess.run([*command, *for_processor(processor), *include, str(source)], check=True)


@ON_X86
def test_a_processor_with_avx2_alone_gives_the_same_outputs(tmp_path: Path) -> None:
    """The kernel as it is compiled there, through the tests of its outputs."""
    require_native()
    tests = Path(__file__).with_name("test_op.py")
    program = f"""
import sys, pytest, torch
from weaver.kernels.cpu import build
build.FLAGS = {for_processor("haswell")!r}
assert build.is_available()
with pytest.raises(RuntimeError, match="this processor has no path dot"):
    torch.ops.weaver_cpu.use_path("dot")
chosen = "outputs and not amx and not dot"
sys.exit(pytest.main(["-p", "no:cacheprovider", {str(tests)!r}, "-k", chosen]))
"""
    environment = {**os.environ, "WEAVER_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
