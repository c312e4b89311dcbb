"""Fisher gradients against autograd, and the predicted KL by hand and against the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor, nn

from weaver.evaluation.sensitivity import output_gradients, predicted_kl

WINDOWS, TOKENS = 3, 10


def ffns_of(model: nn.Module) -> list[nn.Module]:
    layers: Any = model.get_submodule("model.layers")
    return [layer.mlp for layer in layers]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_predicted_kl_by_hand() -> None:
    # g . e is 1 * 3 + 2 * -1 = 1 and 3 * 1 = 3: half of (1 + 9) / 2.
    error_TD = torch.tensor([[3.0, -1.0], [0.0, 1.0]])
    gradient_TD = torch.tensor([[1.0, 2.0], [5.0, 3.0]])
    assert predicted_kl(error_TD, gradient_TD) == 2.5
    assert predicted_kl(error_TD.bfloat16(), gradient_TD.bfloat16()) == 2.5


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_gradients_are_those_of_a_number_added_to_the_output(variant: str) -> None:
    """The derivative by an FFN's output, found by adding a leaf of zeros to it."""
    model = tiny_model(variant)
    ids_WT = random_ids(WINDOWS, TOKENS)
    seen: list[int] = []

    found = output_gradients(model, ffns_of(model), ids_WT, seeded(), seen.append)

    assert seen == [1, 2, 3]
    assert [gradient_TD.shape for gradient_TD in found] == [(WINDOWS * TOKENS, 32)] * 3
    for layer in (0, 2):
        generator = seeded()
        expected = [_gradient(model, ffns_of(model)[layer], ids_T, generator) for ids_T in ids_WT]
        torch.testing.assert_close(found[layer], torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert all(not ffn._forward_hooks for ffn in ffns_of(model))


def _gradient(model: Any, ffn: nn.Module, ids_T: Tensor, generator: torch.Generator) -> Tensor:
    added_TD = torch.zeros(TOKENS, 32, requires_grad=True)
    hook = ffn.register_forward_hook(lambda _module, _inputs, y: y + added_TD)
    logits_TV = model(ids_T[None]).logits[0]
    hook.remove()
    drawn_T = torch.multinomial(logits_TV.softmax(-1).detach(), 1, generator=generator)[:, 0]
    loss = nn.functional.cross_entropy(logits_TV, drawn_T, reduction="sum")
    return torch.autograd.grad(loss, added_TD)[0]


def test_the_prediction_is_of_the_size_of_the_real_divergence() -> None:
    """Small random errors behind the last FFN: second order is all there is.

    Behind the last attention no token sees the error of another one, so that the one assumption
    beside second order holds. Sampled gradients make the prediction itself noisy.
    """
    model = tiny_model("llama")
    ids_WT = random_ids(40, 32)
    last = ffns_of(model)[-1]
    gradient_TD = output_gradients(model, [last], ids_WT, seeded(), lambda _: None)[0]
    error_TD = 0.02 * torch.randn(40 * 32, 32, generator=seeded())

    predicted = predicted_kl(error_TD, gradient_TD)

    dense_WTV = _log_probabilities(model, ids_WT)
    hook = last.register_forward_hook(lambda _module, _inputs, y: y + error_TD.view_as(y))
    moved_WTV = _log_probabilities(model, ids_WT)
    hook.remove()
    real = float((dense_WTV.exp() * (dense_WTV - moved_WTV)).sum(-1).mean())
    assert predicted == pytest.approx(real, rel=0.15)


@torch.no_grad()
def _log_probabilities(model: Any, ids_WT: Tensor) -> Tensor:
    logits_WTV: Tensor = model(ids_WT).logits
    return logits_WTV.log_softmax(-1)
