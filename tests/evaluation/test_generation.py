"""Text that a model writes, and the share of it that repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.errors import WeaverError
from weaver.evaluation.generation import CallbackStreamer, Decoding, generate_ids, repetition

BuildModel = Callable[..., PreTrainedModel]
PROMPT_1T = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([7] * 32, 28 / 29),
        # abcabcabc: the 4-grams abca, bcab, cabc, and each of them again.
        ([1, 2, 3] * 3, 3 / 6),
        # Three tokens may come again, four in a row do not here.
        ([1, 2, 3, 4, 9, 1, 2, 3, 5], 0.0),
        # After five new tokens a loop of two: 5 new 4-grams, 56789 8989..., and 3 of the loop.
        ([5, 6, 7, 8, 9, 8, 9, 8, 9, 8], 2 / 7),
    ],
)
def test_repetition_by_hand(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


def test_repetition_of_other_sizes() -> None:
    assert repetition([1, 2, 1, 2], size=1) == pytest.approx(2 / 4)
    assert repetition([1, 2, 1, 2], size=2) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="n-grams of size 0"):
        repetition([1], size=0)


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_is_a_share_that_grows_when_all_is_said_twice(tokens: list[int]) -> None:
    assert 0 <= repetition(tokens) < 1
    if len(tokens) >= 4:
        assert repetition(tokens * 2) > repetition(tokens)
    assert repetition(list(range(len(tokens)))) == 0


def test_greedy_tokens_are_the_most_probable_ones(build_llama: BuildModel) -> None:
    model = build_llama()
    expected = PROMPT_1T
    for _ in range(6):
        best = model(expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], dim=1)

    found_1N = generate_ids(model, PROMPT_1T, Decoding(6))

    assert torch.equal(found_1N, expected[:, 3:])


def test_equal_seeds_draw_equal_text(build_llama: BuildModel) -> None:
    model = build_llama()

    def drawn(seed: int, top_p: float = 1.0) -> Tensor:
        return generate_ids(model, PROMPT_1T, Decoding(12, 2.0, top_p, seed))

    before = torch.random.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    # The smallest set of tokens that has no probability is that of the most probable one.
    assert torch.equal(drawn(1, top_p=0.0), generate_ids(model, PROMPT_1T, Decoding(12)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_settings_of_the_model_do_not_count(build_llama: BuildModel) -> None:
    model: Any = build_llama()
    plain = generate_ids(model, PROMPT_1T, Decoding(12))
    drawn = generate_ids(model, PROMPT_1T, Decoding(12, 1.5))
    model.generation_config.update(
        repetition_penalty=1.8, top_k=1, no_repeat_ngram_size=2, do_sample=True, max_length=5
    )
    assert torch.equal(generate_ids(model, PROMPT_1T, Decoding(12)), plain)
    assert torch.equal(generate_ids(model, PROMPT_1T, Decoding(12, 1.5)), drawn)


def test_the_end_of_the_text(build_llama: BuildModel) -> None:
    model: Any = build_llama()
    (first,) = generate_ids(model, PROMPT_1T, Decoding(1))[0].tolist()
    model.generation_config.eos_token_id = [first, 2]

    assert generate_ids(model, PROMPT_1T, Decoding(8)).tolist() == [[first]]
    unending = generate_ids(model, PROMPT_1T, Decoding(8), ends=False)
    assert unending.shape == (1, 8)
    assert first not in unending


def test_prompts_of_a_batch_are_independent(build_llama: BuildModel) -> None:
    model = build_llama()
    prompts_BT = torch.tensor([[5, 6, 7], [9, 8, 1]])
    together = generate_ids(model, prompts_BT, Decoding(5), ends=False)
    alone = [generate_ids(model, row[None], Decoding(5), ends=False)[0] for row in prompts_BT]
    assert torch.equal(together, torch.stack(alone))


def test_no_token_can_be_drawn_from_nothing(build_llama: BuildModel) -> None:
    model = build_llama().half()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(WeaverError, match="llama model: no token can be drawn") as caught:
        generate_ids(model, PROMPT_1T, Decoding(2, 1.0))
    assert "torch.float16 are not finite" in caught.value.why
    assert caught.value.fix == "--dtype float32"


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 1.5}])
def test_misuse_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot decode by Decoding"):
        Decoding(**({"max_new_tokens": 1} | bad))


def test_the_streamer_hands_on_the_new_text_in_pieces(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    pieces: list[str] = []
    streamer: Any = CallbackStreamer(tokenizer, pieces.append)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    streamer.put(ids("the prompt")[None])
    for token in ids("two words, and\na line"):
        streamer.put(token[None])
    streamer.put(torch.tensor([tokenizer.eos_token_id]))
    streamer.end()

    assert "".join(pieces) == "two words, and\na line"
    assert [piece for piece in pieces if piece] == ["two ", "words, ", "and\n", "a ", "line"]
