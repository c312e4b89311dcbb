"""Chunked logits are the model's own logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from weaver.errors import WeaverError
from weaver.evaluation.logits import chunked_logits, final_hidden, project, require_usable


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_chunks_equal_full_logits_of_llama(
    build_llama: Callable[..., PreTrainedModel], chunk: int
) -> None:
    model = build_llama()
    ids_T = torch.arange(24)
    chunks = list(chunked_logits(model, ids_T, chunk=chunk))
    assert max(c.shape[0] for c in chunks) == min(chunk, 24)
    torch.testing.assert_close(torch.cat(chunks), model(ids_T[None]).logits[0], atol=1e-5, rtol=0)


def test_chunks_equal_full_logits_of_gemma2_with_its_soft_cap(gemma2: PreTrainedModel) -> None:
    ids_T = torch.arange(24)
    logits_TV = torch.cat(list(chunked_logits(gemma2, ids_T, chunk=10)))
    torch.testing.assert_close(logits_TV, gemma2(ids_T[None]).logits[0], atol=1e-5, rtol=0)
    hidden_TD = final_hidden(gemma2, ids_T[None])[0]
    uncapped_TV = gemma2.get_output_embeddings()(hidden_TD)
    assert uncapped_TV.abs().max() > 3.0 > logits_TV.abs().max()


def test_logits_are_float32_and_without_gradient(
    build_llama: Callable[..., PreTrainedModel],
) -> None:
    model = build_llama().bfloat16()
    (logits_TV,) = chunked_logits(model, torch.arange(5))
    assert logits_TV.dtype == torch.float32
    assert not logits_TV.requires_grad
    assert not project(model, final_hidden(model, torch.arange(5)[None])).requires_grad
    assert torch.is_grad_enabled()
    torch.testing.assert_close(logits_TV, model(torch.arange(5)[None]).logits[0].float())


def test_gradients_stay_enabled_between_chunks(
    build_llama: Callable[..., PreTrainedModel],
) -> None:
    chunks = chunked_logits(build_llama(), torch.arange(6), chunk=2)
    next(chunks)
    assert torch.is_grad_enabled()


def test_projection_takes_any_rows(build_llama: Callable[..., PreTrainedModel]) -> None:
    model = build_llama()
    ids_T = torch.arange(9)
    hidden_TD = final_hidden(model, ids_T[None])[0]
    rows = torch.tensor([8, 0, 3])
    expected = model(ids_T[None]).logits[0, rows]
    torch.testing.assert_close(project(model, hidden_TD[rows]), expected, atol=1e-5, rtol=0)


def test_misuse_is_refused(build_llama: Callable[..., PreTrainedModel]) -> None:
    model = build_llama()
    with pytest.raises(ValueError, match="chunk=0"):
        next(chunked_logits(model, torch.arange(4), chunk=0))
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        next(chunked_logits(model, torch.arange(4)[None]))


@pytest.mark.parametrize("nll", [float("nan"), float("inf"), 1e4])
def test_a_loss_without_meaning_is_an_error(
    build_llama: Callable[..., PreTrainedModel], nll: float
) -> None:
    with pytest.raises(WeaverError, match="llama model: window 3 has a loss of") as error:
        require_usable(build_llama(), nll, "window 3")
    assert "eval.dtype=float32" in error.value.fix
    assert require_usable(build_llama(), 2.5, "window 3") == 2.5
