"""Where a kernel runs, and with which configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl

from weaver.kernels.gpu.configurations import space
from weaver.kernels.gpu.interpret import interpret
from weaver.kernels.gpu.launch import launch, tuned
from weaver.kernels.gpu.prefill import down_kernel, slot_sum_kernel


def test_tuning_is_over_the_space() -> None:
    for kernel, rows in ((down_kernel, 64), (slot_sum_kernel, None)):
        tuner = tuned(kernel, torch.float16, rows)
        assert tuner is tuned(kernel, torch.float16, rows)
        configurations = space(kernel.fn.__name__, torch.float16, "cuda", rows)
        found = [(c.kwargs, c.num_warps, c.num_stages) for c in tuner.configs]
        expected = [(b.sizes(rows), b.num_warps, b.num_stages) for b in configurations]
        assert found == expected
        assert set(tuner.keys) >= {"hidden_size"}
    assert {
        config.kwargs["BLOCK_M"] for config in tuned(down_kernel, torch.float16, 64).configs
    } == {64}


def test_the_interpreter_leaves_nothing_behind(make_problem: Any) -> None:
    before = {name: getattr(tl.core, name) for name in ("load", "store", "reduce", "dot")}
    problem = make_problem("experts of one neuron")
    outputs_PD = torch.ones(problem.ids_TK.numel(), 8)
    arguments = {
        "outputs_PD": outputs_PD,
        "ids_P": problem.ids_TK,
        "factors_P": None,
        "expert_bias_ED": None,
        "y_TD": torch.empty(9, 8),
        "num_experts": 7,
        "hidden_size": 8,
        "top_k": 3,
    }
    launch(slot_sum_kernel, lambda sizes: (9, 8 // min(8, sizes["BLOCK_N"])), arguments)
    assert (arguments["y_TD"] == 3).all()
    assert all(getattr(tl.core, name) is member for name, member in before.items())
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        slot_sum_kernel(**arguments)


def test_an_argument_that_the_kernel_does_not_have(make_problem: Any) -> None:
    with pytest.raises(AssertionError, match="extra"):
        interpret(slot_sum_kernel, (1,), {"extra": make_problem("one token").x_TD})
