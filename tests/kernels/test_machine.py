"""Names and features of the processor, and the folder of what is kept about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaver.kernels.machine import cache_folder, cpu_features, cpu_name


def test_the_processor_by_its_files(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name\t: Example CPU @ 3 GHz\nflags\t\t: fpu avx\nmodel name : other\n"
    )
    assert cpu_name(info) == "Example CPU @ 3 GHz"
    assert cpu_features(info) == "fpu avx"
    assert cpu_name(tmp_path / "missing") != ""
    assert cpu_features(tmp_path / "missing") == ""


def test_an_arm_processor_has_features(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert cpu_features(info) == "fp asimd bf16"


def test_the_cache_is_where_the_user_keeps_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "weaver"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "weaver"
