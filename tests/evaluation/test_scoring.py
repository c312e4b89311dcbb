"""Packed candidates get the numbers they would get alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.errors import WeaverError
from weaver.evaluation.scoring import (
    TRUNK,
    Request,
    Score,
    context_length,
    encode_pair,
    pack_questions,
    score_questions,
    takes_packed_mask,
    visible,
)

BuildModel = Callable[..., PreTrainedModel]
BuildTokenizer = Callable[..., PreTrainedTokenizerFast]

QUESTIONS = [
    [Request((5, 6, 7, 8, 20, 21), 2), Request((5, 6, 7, 8, 30), 1), Request((5, 6, 7, 8, 20), 1)],
    # A common continuation after different contexts, as in a schema task.
    [Request((9, 10, 40, 41, 42), 2), Request((9, 11, 12, 41, 42), 2)],
    [Request((50, 51, 52), 1)],
    # A candidate that is a prefix of another, and two equal ones.
    [Request((60, 61, 62), 2), Request((60, 61, 62, 63), 3), Request((60, 61, 62), 2)],
]


@torch.no_grad()
def alone(model: PreTrainedModel, request: Request) -> Score:
    """The score by its definition: the whole sequence through the whole model."""
    ids = torch.tensor(request.tokens)
    log_p_TV = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
    first = len(request.tokens) - request.scored
    rows = log_p_TV[first - 1 : -1]
    targets = ids[first:]
    total = rows.gather(-1, targets[:, None]).sum().item()
    return Score(total, bool((rows.argmax(-1) == targets).all()))


def assert_equal_scores(model: PreTrainedModel, *, packed: bool | None) -> None:
    results = list(score_questions(model, QUESTIONS, packed=packed))
    assert [len(row) for row in results] == [3, 2, 1, 3]
    for question, row in zip(QUESTIONS, results, strict=True):
        for request, score in zip(question, row, strict=True):
            expected = alone(model, request)
            assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)
            assert score.greedy == expected.greedy


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_equal_those_of_each_candidate_alone(
    build_llama: BuildModel, packed: bool, kv_heads: int, attention: str
) -> None:
    model = build_llama(num_key_value_heads=kv_heads, attn_implementation=attention)
    assert takes_packed_mask(model)
    assert_equal_scores(model, packed=packed)


def test_sliding_window_models_fall_back_and_score_right(gemma2: PreTrainedModel) -> None:
    assert not takes_packed_mask(gemma2)
    assert_equal_scores(gemma2, packed=None)


def test_other_attention_implementations_fall_back(build_llama: BuildModel) -> None:
    model = build_llama()
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_packed_mask(model)


def test_a_sliding_window_without_layer_types_falls_back(build_llama: BuildModel) -> None:
    model = build_llama()
    assert getattr(model.config, "layer_types", None) is None
    model.config.sliding_window = 16
    assert not takes_packed_mask(model)


def test_many_questions_split_into_several_packs(build_llama: BuildModel) -> None:
    model = build_llama()
    calls: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(0)
    questions = [
        [Request(tuple(torch.randint(250, (60,), generator=generator).tolist()), 3)]
        for _ in range(20)
    ]
    scores = list(score_questions(model, questions))
    assert calls == [354, 354, 354, 118]
    assert scores[13][0].log_likelihood == pytest.approx(
        alone(model, questions[13][0]).log_likelihood, abs=1e-4
    )


def test_greedy_is_recognised(build_llama: BuildModel) -> None:
    model = build_llama()
    tokens = [3, 4, 5]
    with torch.no_grad():
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 260]
    (row,) = score_questions(model, [[Request(tuple(tokens), 3), Request(tuple(wrong), 3)]])
    assert [score.greedy for score in row] == [True, False]


def test_pack_of_one_question_by_hand() -> None:
    pack = pack_questions([[Request((1, 2, 3, 4, 9), 2), Request((1, 2, 5, 9), 2)]])
    assert pack.input_ids_P.tolist() == [1, 2, 3, 4, 5]
    assert pack.position_ids_P.tolist() == [0, 1, 2, 3, 2]
    assert pack.branch_P.tolist() == [TRUNK, TRUNK, 0, 0, 1]
    # (4, 9) is predicted by tokens 3 and 4; (5, 9) by the trunk's 2 and by 5.
    assert pack.rows == ((2, 3), (1, 4))
    assert visible(pack).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


REQUEST = st.lists(st.integers(0, 3), min_size=2, max_size=8).flatmap(
    lambda tokens: st.integers(1, len(tokens) - 1).map(lambda n: Request(tuple(tokens), n))
)


@given(st.lists(st.lists(REQUEST, min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_candidate_sees_exactly_its_own_tokens(questions: list[list[Request]]) -> None:
    pack = pack_questions(questions)
    visible_PP = visible(pack)
    rows = iter(pack.rows)
    for question in questions:
        for request in question:
            indices = next(rows)
            seen = visible_PP[indices[-1]].nonzero()[:, 0]
            assert tuple(pack.input_ids_P[seen].tolist()) == request.inputs
            assert pack.position_ids_P[seen].tolist() == list(range(len(request.inputs)))
            assert indices == tuple(seen.tolist()[-request.scored :])


@pytest.mark.parametrize(("tokens", "scored"), [((1, 2), 0), ((1, 2), 2), ((1,), 1)])
def test_a_request_needs_context_and_continuation(tokens: tuple[int, ...], scored: int) -> None:
    with pytest.raises(ValueError, match=f"cannot score {scored} of {len(tokens)}"):
        Request(tokens, scored)


def test_a_model_without_usable_numbers_is_refused(build_llama: BuildModel) -> None:
    model = build_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(WeaverError, match="a task's continuation has a loss of nan"):
        list(score_questions(model, QUESTIONS))


def decoded(tokenizer: PreTrainedTokenizerFast, request: Request) -> tuple[str, str]:
    split = len(request.tokens) - request.scored
    given_text = tokenizer.decode(list(request.tokens[:split]))
    scored_text = tokenizer.decode(list(request.tokens[split:]))
    assert isinstance(given_text, str)
    assert isinstance(scored_text, str)
    return given_text, scored_text


def test_the_space_belongs_to_the_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    request = encode_pair(tokenizer, "a sky", "blue", 100)
    assert decoded(tokenizer, request) == ("a sky", " blue")


def test_white_space_after_the_context_moves_over(tokenizer: PreTrainedTokenizerFast) -> None:
    request = encode_pair(tokenizer, "Question: x\n", "y", 100)
    assert decoded(tokenizer, request) == ("Question: x", "\n y")


def test_a_token_across_the_boundary_is_scored(build_tokenizer: BuildTokenizer) -> None:
    # "y" and the space (written as G with a dot) merge, so "sky" is no prefix of "sky b".
    tokenizer = build_tokenizer(merges=[("y", "Ġ")])
    request = encode_pair(tokenizer, "sky", "b", 100)
    assert decoded(tokenizer, request) == ("sk", "y b")


def test_long_contexts_lose_their_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    request = encode_pair(tokenizer, "abcdefgh", "ij", 6)
    assert decoded(tokenizer, request) == ("efgh", " ij")
    assert len(request.inputs) == 6
    longer_than_context = encode_pair(tokenizer, "ab", "cdefghij", 4)
    assert decoded(tokenizer, longer_than_context) == ("f", "ghij")


def test_bos_stands_first_where_the_tokenizer_puts_it(build_tokenizer: BuildTokenizer) -> None:
    plain, with_bos = build_tokenizer(), build_tokenizer(bos=True)
    tokens = encode_pair(with_bos, "a", "b", 100).tokens
    assert tokens == (with_bos.bos_token_id, *encode_pair(plain, "a", "b", 100).tokens)


def test_an_empty_context_is_stood_for(build_tokenizer: BuildTokenizer) -> None:
    tokenizer = build_tokenizer()
    request = encode_pair(tokenizer, "", "b", 100)
    assert request.tokens[0] == tokenizer.bos_token_id
    assert request.scored == 2
    with pytest.raises(WeaverError, match="nothing stands before ' b'"):
        encode_pair(build_tokenizer(special=False), "", "b", 100)


def test_context_length_is_the_configs(build_llama: BuildModel) -> None:
    assert context_length(build_llama(max_position_embeddings=77)) == 77
