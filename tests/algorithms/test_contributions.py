"""Squared norms and errors of expert outputs against values computed from the outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.contributions import expert_contributions, expert_errors


def test_by_hand() -> None:
    hidden_TF = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    down_FD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 1.0]])
    experts_EN = torch.tensor([[0, 1], [2, 0]])
    # Expert 0 adds (1, 4) and (0, 2), expert 1 adds (15, 3) + (1, 0) and (-5, -1).
    found_TE = expert_contributions(hidden_TF, down_FD, experts_EN)
    assert found_TE.tolist() == [[17.0, 265.0], [4.0, 26.0]]
    # With (1, -1) and (5, 1) on top: (2, 3), (1, 1), (21, 4) and (0, 0).
    bias_ED = torch.tensor([[1.0, -1.0], [5.0, 1.0]])
    found_TE = expert_contributions(hidden_TF, down_FD, experts_EN, bias_ED)
    assert found_TE.tolist() == [[13.0, 457.0], [2.0, 0.0]]


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_squared_norm_of_the_outputs(
    experts: int, width: int, tokens: int, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    neurons = experts * width + 2
    hidden_TF = torch.randn(tokens, neurons, generator=generator)
    down_FD = torch.randn(neurons, 3, generator=generator)
    bias_ED = torch.randn(experts, 3, generator=generator) if with_bias else None
    experts_EN = torch.randperm(neurons, generator=generator)[:-2].view(experts, width)

    found_TE = expert_contributions(hidden_TF, down_FD, experts_EN, bias_ED)

    output_TED = torch.einsum("ten,end->ted", hidden_TF[:, experts_EN], down_FD[experts_EN])
    if bias_ED is not None:
        output_TED = output_TED + bias_ED
    torch.testing.assert_close(found_TE, output_TED.square().sum(-1), atol=1e-4, rtol=1e-4)
    assert float(found_TE.min()) >= 0


def test_tokens_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TF = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    down_FD = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    experts_EN = torch.arange(6).view(2, 3)
    whole_TE = expert_contributions(hidden_TF, down_FD, experts_EN)
    monkeypatch.setattr("weaver.algorithms.contributions._CHUNK_TOKENS", 4)
    torch.testing.assert_close(expert_contributions(hidden_TF, down_FD, experts_EN), whole_TE)


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    hidden_TF = torch.full((1, 1024), 1.0, dtype=torch.bfloat16)
    down_FD = torch.ones(1024, 1, dtype=torch.bfloat16)
    found_TE = expert_contributions(hidden_TF, down_FD, torch.arange(1024).view(1, 1024))
    assert found_TE.dtype == torch.float32
    assert found_TE.tolist() == [[1024.0**2]]


def test_errors_by_hand() -> None:
    hidden_TF = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])
    down_FD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 1.0]])
    experts_EN = torch.tensor([[0, 1], [1, 2]])
    # Outputs (1, 4), (0, 2) of the first, (15, 7), (-5, 1) of the second expert.
    target_TD = torch.tensor([[2.0, 4.0], [0.0, 1.0]])
    found_TE = expert_errors(target_TD, hidden_TF, down_FD, experts_EN)
    assert found_TE.tolist() == [[1.0, 178.0], [1.0, 25.0]]
    # With (1, 0) and (-13, -3) on top: (2, 4), (1, 2), (2, 4) and (-18, -2).
    bias_ED = torch.tensor([[1.0, 0.0], [-13.0, -3.0]])
    found_TE = expert_errors(target_TD, hidden_TF, down_FD, experts_EN, bias_ED)
    assert found_TE.tolist() == [[0.0, 0.0], [2.0, 333.0]]
