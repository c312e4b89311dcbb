"""The smoke test tells a language model from what is none any more."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.data.sources import read_documents
from weaver.evaluation import smoke
from weaver.evaluation.perplexity import compare
from weaver.evaluation.smoke import (
    PROMPT_TOKENS,
    PROMPTS,
    answer,
    kl_problems,
    repetition_problems,
    smoke_result,
    smoke_windows,
)

BuildModel = Callable[..., PreTrainedModel]
TOKENIZER = byte_tokenizer()
V = 260


class TableHead(nn.Module):
    """An output head whose logits depend on nothing."""

    def __init__(self, probabilities_V: Tensor) -> None:
        super().__init__()
        self.logits_V = probabilities_V.log()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits_V.expand(*hidden.shape[:-1], -1)


def constant(model: PreTrainedModel, probabilities_V: Tensor) -> PreTrainedModel:
    """A copy that gives the same distribution everywhere."""
    changed = copy.deepcopy(model)
    changed.set_output_embeddings(TableHead(probabilities_V))
    return changed


@pytest.fixture
def windows_WT(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return smoke_windows(tokenizer)


def test_the_windows_are_the_beginnings_of_all_domains(
    tokenizer: PreTrainedTokenizerFast, windows_WT: Tensor
) -> None:
    documents = read_documents("builtin:held-out", None)
    groups = dict.fromkeys(document.group for document in documents)
    assert len(groups) == 6
    assert windows_WT.shape == (6, smoke.WINDOW_TOKENS)
    for group, row_T in zip(groups, windows_WT, strict=True):
        first = next(document for document in documents if document.group == group)
        assert first.text.startswith(str(tokenizer.decode(row_T)))


def test_a_model_is_no_conversion_of_itself(
    build_llama: BuildModel, tokenizer: PreTrainedTokenizerFast, windows_WT: Tensor
) -> None:
    model = build_llama()
    result = smoke_result(answer(model, windows_WT), model, windows_WT, tokenizer)
    assert [text.prompt for text in result.texts] == [
        tokenizer.decode(row_T[:PROMPT_TOKENS]) for row_T in windows_WT[:PROMPTS]
    ]
    assert all(text.dense == text.converted != "" for text in result.texts)
    assert result.tokens == 6 * 47
    assert (result.kl, result.not_finite, result.dense_not_finite) == (0.0, 0, 0)
    assert result.repetition == result.dense_repetition
    assert result.degenerate == ()


def test_the_kl_is_that_of_eval(build_llama: BuildModel, windows_WT: Tensor) -> None:
    dense, moe = build_llama(), build_llama(seed=1)
    result = smoke_result(answer(dense, windows_WT), moe, windows_WT, TOKENIZER)
    assert result.kl == pytest.approx(compare(dense, moe, windows_WT).kl, abs=1e-4)
    assert result.kl is not None
    assert result.kl > 2
    assert len(result.degenerate) >= 1
    assert result.degenerate[0].startswith(f"KL to the dense model is {result.kl:.2f} nats")


def test_kl_by_hand(build_llama: BuildModel, windows_WT: Tensor) -> None:
    even_V = torch.full((V,), 1 / V)
    uneven_V = torch.cat([torch.full((V // 2,), 1.5 / V), torch.full((V // 2,), 0.5 / V)])
    dense, moe = (constant(build_llama(), p) for p in (even_V, uneven_V))
    result = smoke_result(answer(dense, windows_WT), moe, windows_WT, TOKENIZER)
    # sum_v 1/V (ln 1/V - ln p_v) = -(ln 1.5 + ln 0.5) / 2
    assert result.kl == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 2, abs=1e-4)


def test_one_token_for_ever(build_llama: BuildModel, windows_WT: Tensor) -> None:
    """As probable as before, but always the most probable one: KL alone does not see it."""
    even_V = torch.full((V,), 1 / V)
    favourite_V = even_V.clone()
    favourite_V[65] *= 1.01
    dense = build_llama()
    looping = constant(dense, favourite_V)

    result = smoke_result(
        answer(constant(dense, even_V), windows_WT), looping, windows_WT, TOKENIZER
    )
    assert result.kl == pytest.approx(0, abs=1e-3)
    # 21 4-grams, one of them new. So does the even model: it takes the first token every time.
    assert result.repetition == pytest.approx(20 / 21, abs=1e-4)
    assert result.dense_repetition == result.repetition
    assert result.degenerate == ()

    other = smoke_result(answer(dense, windows_WT), looping, windows_WT, TOKENIZER)
    assert other.dense_repetition < 0.5
    assert any("95% of the 4-grams" in problem for problem in other.degenerate)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(
    build_llama: BuildModel, windows_WT: Tensor, value: float
) -> None:
    dense = build_llama()
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.get_output_embeddings().weight[3].fill_(value)

    result = smoke_result(answer(dense, windows_WT), broken, windows_WT, TOKENIZER)
    assert (result.kl, result.not_finite, result.dense_not_finite) == (None, 282, 0)
    assert result.degenerate[0] == (
        "logits of the converted model are not finite at 282 of 282 tokens"
    )
    both = smoke_result(answer(broken, windows_WT), dense, windows_WT, TOKENIZER)
    assert (both.kl, both.not_finite, both.dense_not_finite) == (None, 0, 282)
    assert both.degenerate[0].startswith("logits of the dense model are not finite")


def test_the_bounds() -> None:
    assert kl_problems(None) == []
    assert kl_problems(2.0) == []
    assert kl_problems(2.01) == ["KL to the dense model is 2.01 nats per token, above 2"]
    # As much as the dense model, or less than the bound, is not degenerate.
    assert repetition_problems(0.9, 0.66) == []
    assert repetition_problems(0.6, 0.0) == []
    assert repetition_problems(0.9, 0.64) == [
        "90% of the 4-grams that it writes repeat earlier ones, of the dense model's 64%"
    ]
