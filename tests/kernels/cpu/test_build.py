"""Where the compiled kernel lies, who compiles it, and what happens without a compiler."""

from __future__ import annotations

import hashlib
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
    assert library.parent.stat().st_mode & 0o777 == 0o700
    # What a killed compiler left is removed by the next one, and a damaged library made anew.
    (empty_cache / f"{build.BUILDING}x").mkdir()
    library.write_text("libr")
    build._build(library)
    assert (len(calls), library.read_text()) == (2, "library")
    assert not (empty_cache / f"{build.BUILDING}x").exists()


@pytest.mark.parametrize("content", [b"", b"\x7fELF cut off"])
def test_a_damaged_library_is_not_loaded(
    content: bytes, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading a truncated one ends the process with SIGBUS."""
    built: list[Path] = []
    loaded: list[str] = []
    monkeypatch.setattr(build, "_build", built.append)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    library = compiled_kernel()
    library.parent.mkdir(mode=0o700)
    library.write_bytes(content)
    build._digest_file(library).write_text("0" * 64)
    build.is_available()
    assert built == [library]


@pytest.mark.parametrize("what", ["folder", "library", "cache", "link", "owner"])
def test_a_library_that_others_could_have_written_is_not_loaded(
    what: str,
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(torch.ops, "weaver_cpu", object())
    library = compiled_kernel()
    library.parent.mkdir(mode=0o700)
    library.write_bytes(b"somebody's code")
    digest = hashlib.sha256(b"somebody's code").hexdigest()
    build._digest_file(library).write_text(digest)
    opened = {"folder": library.parent, "library": library, "cache": empty_cache}
    if what in opened:
        opened[what].chmod(0o777)
    elif what == "link":
        library.rename(empty_cache / "elsewhere.so")
        library.symlink_to(empty_cache / "elsewhere.so")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        os.chown(library.parent, 54321, -1) if os.getuid() == 0 else None
        if os.getuid() != 0:
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with caplog.at_level(logging.WARNING):
        assert not build.is_available()
    assert not loaded
    assert "The CPU kernel is not used" in caplog.text
    opened.get(what, library.parent).chmod(0o700)


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
