"""Tests of the C++ kernel run wherever there is a compiler; a kernel that it refuses fails them."""

from __future__ import annotations

import shutil

import pytest
from torch.utils import cpp_extension

from weaver.kernels.cpu import build


def require_native() -> None:
    """Skips on a machine without a C++ compiler, where weaver falls back to torch as well."""
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("no C++ compiler on this machine; the fallback is tested without one")
    assert build.is_available(), "there is a compiler, but the kernel does not compile or load"
