"""Fisher gradients layer by layer are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_conversions import OpenTiny
from tiny_models import HIDDEN_SIZE, NUM_LAYERS, TINY, random_ids, tiny_model
from torch import Tensor, nn

from weaver.algorithms.sensitivity import predicted_kl
from weaver.models import backward, stream
from weaver.models.backward import FfnGradients, fisher_gradients
from weaver.models.checkpoint import Checkpoint
from weaver.models.stream import DecoderStream

WINDOWS, TOKENS = 3, 10


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def ffn_of(model: nn.Module, layer: int) -> nn.Module:
    return model.get_submodule(f"model.layers.{layer}.mlp")


def streamed(
    checkpoint: Checkpoint, ids_WT: Tensor, folder: Path, seen: list[int] | None = None
) -> list[FfnGradients]:
    decoder = DecoderStream(checkpoint, torch.float32, ids_WT)
    on_layer = ([] if seen is None else seen).append
    return list(fisher_gradients(decoder, folder, seeded(), on_layer))[::-1]


@pytest.mark.parametrize("variant", TINY)
def test_gradients_are_those_of_a_number_added_to_the_output(
    open_tiny: OpenTiny, tmp_path: Path, variant: str
) -> None:
    """The derivative by an FFN's output, found by adding a leaf of zeros to it."""
    checkpoint, model, ids_WT = open_tiny(variant), tiny_model(variant), random_ids(WINDOWS, TOKENS)
    seen: list[int] = []

    found = streamed(checkpoint, ids_WT, tmp_path, seen)

    assert seen == [0, 1, 2, 2, 1, 0]
    assert [each.layer for each in found] == list(range(NUM_LAYERS))
    for each in found:
        generator = seeded()
        ffn = ffn_of(model, each.layer)
        expected = [_gradient(model, ffn, ids_T, generator) for ids_T in ids_WT]
        torch.testing.assert_close(each.gradients_TD, torch.cat(expected), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(ffn(each.inputs_TD), each.outputs_TD, atol=1e-5, rtol=1e-4)


def _gradient(model: Any, ffn: nn.Module, ids_T: Tensor, generator: torch.Generator) -> Tensor:
    added_TD = torch.zeros(TOKENS, HIDDEN_SIZE, requires_grad=True)
    hook = ffn.register_forward_hook(lambda _module, _inputs, y: y + added_TD)
    logits_TV = model(ids_T[None]).logits[0]
    hook.remove()
    drawn_T = torch.multinomial(logits_TV.softmax(-1).detach(), 1, generator=generator)[:, 0]
    loss = nn.functional.cross_entropy(logits_TV, drawn_T, reduction="sum")
    return torch.autograd.grad(loss, added_TD)[0]


def test_batches_and_chunks_change_nothing(
    open_tiny: OpenTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window and three tokens at a time: the draws come in the same order."""
    checkpoint, ids_WT = open_tiny("gemma2"), random_ids(WINDOWS, TOKENS)
    together = streamed(checkpoint, ids_WT, tmp_path)
    monkeypatch.setattr(stream, "BATCH_TOKENS", TOKENS)
    monkeypatch.setattr(backward, "chunk_tokens", lambda _model: 3)
    for ours, theirs in zip(streamed(checkpoint, ids_WT, tmp_path), together, strict=True):
        torch.testing.assert_close(ours.gradients_TD, theirs.gradients_TD, rtol=1e-4, atol=1e-5)


def test_the_prediction_is_of_the_size_of_the_real_divergence(
    open_tiny: OpenTiny, tmp_path: Path
) -> None:
    """Small random errors behind the last FFN: second order is all there is.

    Behind the last attention no token sees the error of another one, so that the one assumption
    beside second order holds. Sampled gradients make the prediction itself noisy.
    """
    model, ids_WT = tiny_model("llama"), random_ids(40, 32)
    gradient_TD = streamed(open_tiny("llama"), ids_WT, tmp_path)[-1].gradients_TD
    error_TD = 0.02 * torch.randn(40 * 32, HIDDEN_SIZE, generator=seeded())

    predicted = predicted_kl(error_TD, gradient_TD)

    dense_WTV = _log_probabilities(model, ids_WT)
    last = ffn_of(model, NUM_LAYERS - 1)
    hook = last.register_forward_hook(lambda _module, _inputs, y: y + error_TD.view_as(y))
    moved_WTV = _log_probabilities(model, ids_WT)
    hook.remove()
    real = float((dense_WTV.exp() * (dense_WTV - moved_WTV)).sum(-1).mean())
    assert predicted == pytest.approx(real, rel=0.15)


@torch.no_grad()
def _log_probabilities(model: Any, ids_WT: Tensor) -> Tensor:
    logits_WTV: Tensor = model(ids_WT).logits
    return logits_WTV.log_softmax(-1)
