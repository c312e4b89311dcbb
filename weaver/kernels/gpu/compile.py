"""Resources of each kernel on each architecture, found by compiling it, without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weaver.kernels.gpu import decode, gradients, prefill
from weaver.kernels.gpu.configurations import Blocks, GpuPlatform, space, tile_choices

KERNELS: dict[str, Any] = {
    kernel.fn.__name__: kernel
    for kernel in (
        prefill.gate_up_kernel,
        prefill.down_kernel,
        prefill.slot_sum_kernel,
        decode.decode_hidden_kernel,
        decode.decode_down_kernel,
        gradients.hidden_gradients_kernel,
        gradients.input_gradient_kernel,
        gradients.weight_gradient_kernel,
    )
}

# Kernels that multiply matrices; the others add up products of vectors.
GEMMS = frozenset(
    {
        "gate_up_kernel",
        "down_kernel",
        "hidden_gradients_kernel",
        "input_gradient_kernel",
        "weight_gradient_kernel",
    }
)

# float16 differs from bfloat16 in the type of the same instructions only.
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Architecture:
    """A GPU to compile for.

    Args:
        target: what Triton calls it.
        shared_bytes: shared memory that one program may have.
        matrix: instructions that multiply matrices, a pattern.
        async_copy: instructions that copy from global to shared memory, a pattern.
    """

    target: GPUTarget
    shared_bytes: int
    matrix: str
    async_copy: str

    @property
    def backend(self) -> GpuPlatform:
        return "cuda" if self.target.backend == "cuda" else "hip"


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 163 << 10, r"HMMA", r"LDGSTS"),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 227 << 10, r"HG?MMA", r"LDGSTS|UTMALDG"),
    "sm_100": Architecture(
        GPUTarget("cuda", 100, 32), 227 << 10, r"UTC\w*MMA|HMMA", r"LDGSTS|UTMALDG"
    ),
    "gfx942": Architecture(
        GPUTarget("hip", "gfx942", 64), 64 << 10, r"v_mfma\w*", r"(?:buffer|global)_load_lds\w*"
    ),
}


@dataclass(frozen=True)
class Instructions:
    """How often instructions occur in the program, loops counted once.

    Args:
        matrix: those that multiply matrices.
        async_copy: those that copy from global to shared memory.
    """

    matrix: int
    async_copy: int


@dataclass(frozen=True)
class Case:
    """One kernel to compile: configuration, architecture and type of the weights.

    Args:
        kernel: its name.
        config: block sizes, num_warps and num_stages.
        arch: a key of ``ARCHITECTURES``.
        dtype: a key of ``DTYPES``.
    """

    kernel: str
    config: dict[str, int]
    arch: str
    dtype: str


@dataclass(frozen=True)
class Resources(Case):
    """Resources of a compiled kernel: registers, memory and instruction counts.

    Args:
        registers: per thread.
        spill_bytes: stack or scratch memory per thread.
        shared_bytes: per program.
        instructions: counts of some instructions.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Instructions


def all_cases() -> Iterator[Case]:
    """Every kernel in every configuration of its space, on every architecture."""
    for kernel in KERNELS:
        for arch, architecture in ARCHITECTURES.items():
            for name, dtype in DTYPES.items():
                for rows in tile_choices(kernel, dtype):
                    for blocks in space(kernel, dtype, architecture.backend, rows):
                        yield Case(kernel, named_config(blocks, rows), arch, name)


def named_config(blocks: Blocks, rows: int | None) -> dict[str, int]:
    """The constants of a configuration by name, with warps and stages."""
    launched = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return {**blocks.sizes(rows), **launched}


def measure(case: Case) -> Resources:
    """Compile one kernel and read what it takes from the binary.

    It is compiled with all biases and the activation with most registers (gelu).
    """
    architecture = ARCHITECTURES[case.arch]
    compiled = compile_kernel(case)
    if architecture.backend == "cuda":
        registers, spill_bytes, text = _inspect_cubin(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spill_bytes = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return Resources(
        **asdict(case),
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        instructions=Instructions(
            matrix=len(re.findall(rf"\b(?:{architecture.matrix})\b", text)),
            async_copy=len(re.findall(rf"\b(?:{architecture.async_copy})\b", text)),
        ),
    )


def compile_kernel(case: Case) -> Any:
    """Triton's compiled kernel, with arguments specialised as the launcher would.

    Pointers, strides, D and N are multiples of 16.
    """
    kernel, config = KERNELS[case.kernel], dict(case.config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants: dict[str, Any] = {"ACTIVATION": "gelu", "DENSE": False, "UPCAST": False, **config}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type(name, case.dtype)
        if name not in constants and name not in ("num_experts", "top_k"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=ARCHITECTURES[case.arch].target, options=options)


def problems(found: Resources) -> list[str]:
    """Why a configuration must not be used; empty if it may be."""
    limit = ARCHITECTURES[found.arch].shared_bytes
    said = []
    if found.spill_bytes:
        said.append(f"spills {found.spill_bytes} bytes")
    if found.shared_bytes > limit:
        said.append(f"{found.shared_bytes} bytes of shared memory, more than {limit}")
    # IEEE float32 has no matrix instruction on most architectures.
    if found.kernel in GEMMS and found.dtype != "fp32" and not found.instructions.matrix:
        said.append("no matrix instruction")
    return said


def write_table(found: Sequence[Resources], path: Path) -> None:
    """A JSON list with one line per compiled kernel."""
    lines = ",\n".join(json.dumps(asdict(resources)) for resources in found)
    path.write_text(f"[\n{lines}\n]\n")


def read_table(path: Path) -> list[Resources]:
    """Read the JSON list of compiled kernels that ``write_table`` wrote."""
    return [
        Resources(**{**row, "instructions": Instructions(**row["instructions"])})
        for row in json.loads(path.read_text())
    ]


_POINTERS = {
    "order_P": "i64",
    "offsets_E": "i64",
    "tile_experts_M": "i64",
    "tile_rows_M": "i64",
    "ids_P": "i64",
    "factors_P": "fp32",
    "dfactors_PB": "fp32",
    "weighted_PN": "fp32",
}
_INTEGERS = frozenset({"num_experts", "hidden_size", "width", "top_k"})


def _type(argument: str, dtype: str) -> str:
    if argument in _INTEGERS or argument.startswith("stride_"):
        return "i32"
    return f"*{_POINTERS.get(argument, dtype)}"


def _inspect_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        text = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", str(path))
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), text


def _tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in the compiler's output"
    return int(match[1])
