"""The byte model of the down projection, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weaver.kernels.gpu import variants
from weaver.kernels.gpu.variants import PrefillShape, choose_variant, down_cost


def test_costs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """T = 10, D = 8, E = 4 experts of N = 2, K = 3: P = 30, R = 8, P D = 240, T D = 80."""
    shape = PrefillShape(10, 8, 4, 2, 3, element_size=2)
    monkeypatch.setattr(variants, "MACS_PER_BYTE", {2: 1000.0})
    # Memory decides. Reads 60 + 64 and writes 240, then reads 240 and writes 80.
    assert down_cost(shape, "pairs") == 2 * (60 + 64 + 240) + 2 * (240 + 80)
    # Fills 80, reads 80 + 64, writes 80.
    assert down_cost(shape, "dense") == 2 * 80 + 2 * (80 + 64 + 80)
    assert choose_variant(shape) == "dense"
    monkeypatch.setattr(variants, "MACS_PER_BYTE", {2: 0.25})
    # Arithmetic decides: 30 * 8 * 2 and 80 * 8 multiply-adds, 4 bytes each.
    assert down_cost(shape, "pairs") == 4 * 480 + 2 * (240 + 80)
    assert down_cost(shape, "dense") == 2 * 80 + 4 * 640
    assert choose_variant(shape) == "pairs"


@pytest.mark.parametrize(
    ("experts", "top_k", "variant"),
    [(8, 6, "pairs"), (8, 4, "pairs"), (64, 48, "dense"), (64, 32, "dense"), (8, 8, "dense")],
)
def test_coarse_experts_take_pairs_and_fine_ones_the_dense_gemm(
    experts: int, top_k: int, variant: str
) -> None:
    """2,048 tokens of a Llama-3-8B FFN in 16 bits, with 25%, 50% and no sparsity."""
    shape = PrefillShape(2048, 4096, experts, 14336 // experts, top_k, element_size=2)
    assert choose_variant(shape) == variant


def test_float32_computes_too_slowly_for_the_dense_gemm() -> None:
    shape = PrefillShape(2048, 4096, 8, 1792, 6, element_size=4)
    assert choose_variant(shape) == "pairs"
    assert choose_variant(replace(shape, top_k=8)) == "dense"
