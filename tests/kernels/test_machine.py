"""Names and features of the processor."""

from __future__ import annotations

from pathlib import Path

from weaver.kernels.machine import cpu_features, cpu_mhz, cpu_name


def test_the_processor_by_its_files(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name\t: Example CPU @ 3 GHz\ncpu MHz\t\t: 2000.5\n"
        "flags\t\t: fpu avx\nmodel name : other\ncpu MHz : 1000\n"
    )
    assert cpu_name(info) == "Example CPU @ 3 GHz"
    assert cpu_features(info) == "fpu avx"
    assert cpu_mhz(info) == 2000.5
    assert cpu_mhz(tmp_path / "missing") is None
    assert cpu_name(tmp_path / "missing") != ""
    assert cpu_features(tmp_path / "missing") == ""


def test_an_arm_processor_has_features(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert cpu_features(info) == "fp asimd bf16"
