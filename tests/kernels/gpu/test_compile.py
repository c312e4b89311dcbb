"""The committed table of resources, and that compiling gives what it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import triton

from weaver.kernels.gpu.compile import (
    ARCHITECTURES,
    GEMMS,
    KERNELS,
    Case,
    Instructions,
    Resources,
    all_cases,
    measure,
    problems,
    read_table,
    write_table,
)
from weaver.kernels.gpu.decode import decode_forward

TABLE = Path(__file__).parents[3] / "docs" / "kernel_resources.json"
# The release of Triton whose compiler made the table.
TRITON = "3.7.1"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that was compiled before is found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def key(case: Case) -> tuple[object, ...]:
    return (case.kernel, tuple(sorted(case.config.items())), case.arch, case.dtype)


def test_the_table_covers_every_configuration_once() -> None:
    table = Counter(key(resources) for resources in read_table(TABLE))
    assert table == Counter(key(case) for case in all_cases())
    assert {kernel for kernel, *_ in table} == set(KERNELS)


def test_no_configuration_in_the_table_has_a_problem() -> None:
    assert [found for found in read_table(TABLE) if problems(found)] == []


def test_kernels_without_matrix_products_have_no_matrix_instruction() -> None:
    for found in read_table(TABLE):
        if found.kernel not in GEMMS:
            assert found.instructions.matrix == 0


# One configuration per architecture, and of every kind of kernel.
SAMPLE = (
    ("down_kernel", "sm_80", "bf16"),
    ("gate_up_kernel", "sm_90", "bf16"),
    ("weight_gradient_kernel", "sm_100", "bf16"),
    ("hidden_gradients_kernel", "gfx942", "bf16"),
    ("decode_down_kernel", "sm_90", "fp32"),
)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("kernel", "arch", "dtype"), SAMPLE)
def test_compiling_again(kernel: str, arch: str, dtype: str) -> None:
    written = next(
        found
        for found in read_table(TABLE)
        if (found.kernel, found.arch, found.dtype) == (kernel, arch, dtype)
    )
    found = measure(Case(written.kernel, written.config, written.arch, written.dtype))
    assert problems(found) == []
    if triton.__version__ == TRITON:
        assert found == written


@pytest.mark.usefixtures("fresh")
def test_compiling_after_interpreting(make_problem: Any) -> None:
    """The interpreter leaves nothing behind in Triton's modules."""
    problem = make_problem("one token")
    decode_forward(problem.x_TD, problem.experts, problem.ids_TK, problem.factors_TK)
    config = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    assert problems(measure(Case("decode_down_kernel", config, "sm_80", "bf16"))) == []


@pytest.mark.usefixtures("fresh")
def test_a_spill_is_found() -> None:
    """Two sums of 128 x 128 numbers in four warps: 256 registers per thread for them alone."""
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}
    config = {**blocks, "num_warps": 4, "num_stages": 2}
    found = measure(Case("gate_up_kernel", config, "sm_80", "bf16"))
    assert found.spill_bytes > 0
    assert problems(found) == [f"spills {found.spill_bytes} bytes"]


GOOD = Resources(
    "down_kernel",
    {"BLOCK_M": 64},
    "sm_90",
    "bf16",
    registers=128,
    spill_bytes=0,
    shared_bytes=232448,
    instructions=Instructions(matrix=4, async_copy=8),
)


def test_problems_by_hand() -> None:
    assert problems(GOOD) == []
    assert problems(replace(GOOD, spill_bytes=8)) == ["spills 8 bytes"]
    assert problems(replace(GOOD, arch="sm_80")) == [
        "232448 bytes of shared memory, more than 166912"
    ]
    assert problems(replace(GOOD, arch="gfx942", shared_bytes=65536)) == []
    without = replace(GOOD, instructions=Instructions(matrix=0, async_copy=8))
    assert problems(without) == ["no matrix instruction"]
    assert problems(replace(without, dtype="fp32")) == []
    assert problems(replace(without, kernel="slot_sum_kernel")) == []


def test_the_table_on_disk(tmp_path: Path) -> None:
    rows = [GOOD, replace(GOOD, registers=64)]
    write_table(rows, tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == rows
    assert list(asdict(GOOD)) == [
        "kernel",
        "config",
        "arch",
        "dtype",
        "registers",
        "spill_bytes",
        "shared_bytes",
        "instructions",
    ]
    assert set(ARCHITECTURES) == {"sm_80", "sm_90", "sm_100", "gfx942"}
