"""The GPU benchmark as far as it goes without a GPU."""

from __future__ import annotations

import sys

import bench_gpu
import pytest
import torch
from bench_gpu import Layer, Problem, check, errors, make_problem, measure, methods, table

TINY = Layer("tiny", hidden=32, shared=16, experts=4, width=16, top_k=2)
CPU = torch.device("cpu")


@pytest.fixture
def tiny() -> Problem:
    return make_problem(TINY, 6, torch.float32, CPU)


def test_layers_have_the_sparsity_in_their_names() -> None:
    for layer in bench_gpu.LAYERS:
        neurons = layer.shared + layer.experts * layer.width
        skipped = (layer.experts - layer.top_k) * layer.width
        assert skipped / neurons == (0.5 if "50%" in layer.name else 0.25)


def test_all_methods_but_dense_compute_the_same(tiny: Problem) -> None:
    found = {name: method() for name, method in methods(tiny).items()}
    assert list(found) == [
        "dense",
        "weaver",
        "grouped_mm",
        "transformers grouped_mm",
        "transformers batched_mm",
    ]
    dense_TD = found.pop("dense")
    assert 0.3 < dense_TD.std() < 3
    for name, y_TD in found.items():
        torch.testing.assert_close(y_TD, found["weaver"], rtol=1e-5, atol=1e-5, msg=name)


def test_an_error_ends_the_program(tiny: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(errors(tiny)) == {"y", "x_TD", "gate_FD", "up_FD", "down_FD", "factors_TK"}
    check(tiny)
    monkeypatch.setattr(bench_gpu, "TOLERANCE", {torch.float32: 1e-12})
    with pytest.raises(SystemExit, match=r"tiny, torch.float32, T = 6: relative error .* of y"):
        check(tiny)


def test_timings_and_their_table(tiny: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = measure(tiny, repeats=1)
    assert set(seconds) == set(methods(tiny))
    for timing in seconds.values():
        assert 0 < timing["p10"] <= timing["median"] <= timing["p90"]
    times = {name: {"median": s, "p10": s, "p90": s} for name, s in (("dense", 2.0), ("weaver", 1))}
    slow = {"weaver, graph": {"median": 4.0, "p10": 3.0, "p90": 5.0}}
    lines = table([{"layer": "tiny", "tokens": 6, "seconds": {**times, **slow}}]).splitlines()
    assert len(lines) == 5
    assert ["slower than dense" in line for line in lines[2:]] == [False, False, True]
    assert "2.00x" in lines[3]
    assert "0.50x, slower than dense" in lines[4]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA or ROCm device; nothing was measured") as raised:
        bench_gpu.main()
    # A message as the code is exit status 1.
    assert isinstance(raised.value.code, str)


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        bench_gpu.main()
    assert "--repeats" in capsys.readouterr().out
