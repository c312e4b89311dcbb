"""Perplexity, KL and agreement on models whose distributions are known by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weaver.errors import WeaverError
from weaver.evaluation.perplexity import compare, perplexity

BuildModel = Callable[..., PreTrainedModel]
V = 260


class ConstantHead(nn.Module):
    """An output head that gives the same logits whatever it reads."""

    def __init__(self, logits_V: Tensor) -> None:
        super().__init__()
        self.logits_V = logits_V

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits_V.expand(*hidden.shape[:-1], -1)


def constant(model: PreTrainedModel, probabilities_V: Tensor) -> PreTrainedModel:
    """The model with a fixed distribution over the next token."""
    head: Any = ConstantHead(probabilities_V.log())
    model.set_output_embeddings(head)
    return model


def two_point(p: float) -> Tensor:
    """p on token 0, q = 1 - p - 258e-9 on token 1, nearly nothing on the other 258."""
    distribution_V = torch.full((V,), 1e-9, dtype=torch.float64)
    distribution_V[0] = p
    distribution_V[1] = 1.0 - p - (V - 2) * 1e-9
    return distribution_V.float()


def test_a_uniform_model_has_the_vocabulary_as_perplexity(build_llama: BuildModel) -> None:
    model = constant(build_llama(), torch.full((V,), 1.0 / V))
    losses = perplexity(model, torch.randint(V, (3, 9)))
    assert losses.perplexity == pytest.approx(V, rel=1e-5)
    assert losses.nll == pytest.approx([math.log(V)] * 3)
    assert losses.tokens == 3 * 8


def test_perplexity_equals_the_models_own_loss(build_llama: BuildModel) -> None:
    model = build_llama()
    windows_WT = torch.randint(V, (2, 17), generator=torch.Generator().manual_seed(1))
    losses = perplexity(model, windows_WT, chunk=5)
    own = [model(ids[None], labels=ids[None]).loss.item() for ids in windows_WT]
    assert losses.nll == pytest.approx(own, abs=1e-5)
    assert losses.perplexity == pytest.approx(math.exp(sum(own) / 2), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 64])
def test_the_last_position_predicts_nothing_whatever_the_chunk(
    build_llama: BuildModel, chunk: int
) -> None:
    windows_WT = torch.randint(V, (1, 17), generator=torch.Generator().manual_seed(1))
    reference = compare(build_llama(), build_llama(seed=1), windows_WT)
    chunked = compare(build_llama(), build_llama(seed=1), windows_WT, chunk=chunk)
    assert chunked.kl == pytest.approx(reference.kl, rel=1e-5)
    assert chunked.moe.perplexity == pytest.approx(reference.moe.perplexity, rel=1e-5)
    assert chunked.top1_agreement == reference.top1_agreement
    assert chunked.tokens == 16


def test_a_model_compared_with_itself(build_llama: BuildModel) -> None:
    model = build_llama()
    result = compare(model, model, torch.randint(V, (2, 12)))
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0
    assert result.dense == result.moe


def test_kl_of_two_known_distributions(build_llama: BuildModel) -> None:
    dense = constant(build_llama(), two_point(0.75))
    converted = constant(build_llama(), two_point(0.5))
    windows_WT = torch.tensor([[1, 0, 0, 1, 0]])
    result = compare(dense, converted, windows_WT, chunk=2)
    # KL(3/4, 1/4 || 1/2, 1/2) = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812
    assert result.kl == pytest.approx(0.130812, abs=1e-5)
    # Targets 0, 0, 1, 0: dense -(3 ln 0.75 + ln 0.25) / 4 = 0.562335, converted ln 2.
    assert result.dense.nll == pytest.approx((0.562335,), abs=1e-5)
    assert result.moe.perplexity == pytest.approx(2.0, rel=1e-5)


def test_agreement_is_a_share_of_positions(build_llama: BuildModel) -> None:
    dense, converted = build_llama(), build_llama(seed=1)
    windows_WT = torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(2))
    best_dense = dense(windows_WT).logits[:, :-1].argmax(-1)
    best_converted = converted(windows_WT).logits[:, :-1].argmax(-1)
    expected = (best_dense == best_converted).float().mean(-1).tolist()
    result = compare(dense, converted, windows_WT)
    assert list(result.top1_per_window) == pytest.approx(expected)


def test_disagreement_of_known_heads(build_llama: BuildModel) -> None:
    dense = constant(build_llama(), two_point(0.75))
    converted = constant(build_llama(), two_point(0.25))
    assert compare(dense, converted, torch.zeros(1, 4, dtype=torch.int64)).top1_agreement == 0.0


def test_progress_is_reported(build_llama: BuildModel) -> None:
    done: list[int] = []
    model = build_llama()
    windows_WT = torch.randint(V, (3, 5))
    perplexity(model, windows_WT, on_window=done.append)
    compare(model, model, windows_WT, on_window=done.append)
    assert done == [1, 2, 3, 1, 2, 3]


def test_different_vocabularies_are_refused(build_llama: BuildModel) -> None:
    with pytest.raises(WeaverError, match="dense 260, converted 300 tokens"):
        compare(build_llama(), build_llama(vocab_size=300), torch.zeros(1, 4, dtype=torch.int64))


def test_infinite_logits_are_refused(build_llama: BuildModel) -> None:
    dense, broken = build_llama(), build_llama()
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(float("nan"))
    windows_WT = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(WeaverError, match="window 0 has a loss of nan"):
        perplexity(broken, windows_WT)
    with pytest.raises(WeaverError, match="window 0 has a loss of nan"):
        compare(dense, broken, windows_WT)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 1)])
def test_windows_need_two_tokens(build_llama: BuildModel, shape: tuple[int, ...]) -> None:
    model = build_llama()
    with pytest.raises(ValueError, match="windows of shape"):
        perplexity(model, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="windows of shape"):
        compare(model, model, torch.zeros(shape, dtype=torch.int64))
