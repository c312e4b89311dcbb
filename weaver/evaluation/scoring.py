"""Log-likelihoods of continuations: candidates of one question share the work of what they share.

Candidates of a question are packed into one sequence: the tokens they have in common at the start
(the trunk) once, then the rest of each (a branch). A 4-D mask lets a branch see the trunk and
itself, and its positions go on from the trunk's end, so every candidate gets exactly the numbers it
would get alone. Several questions share one sequence in the same way, without seeing each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.errors import WeaverError
from weaver.evaluation.logits import final_hidden, project, require_usable
from weaver.models.output_head import chunk_tokens

# Longer packs save calls, but the masked attention between questions is wasted work that grows
# with the square of the pack.
PACK_TOKENS = 384
TRUNK = -1


@dataclass(frozen=True)
class Request:
    """A token sequence whose last ``scored`` tokens are the continuation."""

    tokens: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.tokens):
            raise ValueError(f"cannot score {self.scored} of {len(self.tokens)} tokens")

    @property
    def inputs(self) -> tuple[int, ...]:
        """Input tokens of the model: all but the last one, which is only predicted."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Score:
    """Log-likelihood of a continuation, and whether greedy decoding would produce it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Pack:
    """Questions laid out in one sequence of P tokens (or in padded rows, flattened).

    Args:
        input_ids_P: token ids, int64.
        position_ids_P: positions within each candidate, int64.
        question_P: index of the question a token belongs to.
        branch_P: index of the candidate within the question, or ``TRUNK``.
        rows: per candidate the indices of the tokens that predict its continuation.
    """

    input_ids_P: Tensor
    position_ids_P: Tensor
    question_P: Tensor
    branch_P: Tensor
    rows: tuple[tuple[int, ...], ...]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, max_length: int
) -> Request:
    """Tokens of ``context + " " + continuation``, and how many of them are the continuation.

    The rules are lm-evaluation-harness's: one space joins the two; white space at the end of the
    context counts as part of the continuation; the whole text is tokenised at once and what
    follows the context's own tokens is scored. Where a token spans the boundary, so that the
    context's tokens are no prefix of the whole's, scoring starts at the first token that differs.
    Sequences longer than the model's context lose tokens on the left. Deviation: a BOS token
    stands first whenever the tokenizer puts one there by default (lm-eval does so for Gemma only).

    Args:
        tokenizer: the model's tokenizer.
        context: the text that is given.
        continuation: the text that is scored.
        max_length: positions the model has.
    Raises:
        WeaverError: the context is empty and the tokenizer has no BOS or EOS to stand for it.
    """
    whole_text = f"{context} {continuation}"
    prefix = _prefix(tokenizer)
    whole = prefix + _encode(tokenizer, whole_text)
    given = prefix + _encode(tokenizer, context.rstrip())
    shared = _common_prefix([given, whole])
    if shared == 0:
        whole, shared = (_stand_in(tokenizer, whole_text), *whole), 1
    # The last token is only predicted, so the model reads one token less than the sequence has.
    tokens = whole[-(max_length + 1) :]
    return Request(tokens, min(len(whole) - shared, len(tokens) - 1))


def context_length(model: PreTrainedModel) -> int:
    """Positions that the model was made for."""
    return int(model.config.max_position_embeddings)


def takes_packed_mask(model: PreTrainedModel) -> bool:
    """Whether the model honours a 4-D mask in every layer.

    Layers with a sliding window (or any attention that is not full) mask by index, which means
    another distance in a packed sequence; of the attention implementations eager and sdpa add a
    4-D mask as it is; and the backbone must take position ids.
    """
    config = model.config
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        full = all(kind == "full_attention" for kind in layer_types)
    else:
        full = getattr(config, "sliding_window", None) is None
    parameters = inspect.signature(model.base_model.forward).parameters
    return (
        full
        and getattr(config, "_attn_implementation", None) in {"eager", "sdpa"}
        and {"position_ids", "attention_mask"} <= parameters.keys()
    )


def score_questions(
    model: PreTrainedModel,
    questions: Sequence[Sequence[Request]],
    *,
    first: int = 0,
    packed: bool | None = None,
) -> Iterator[tuple[Score, ...]]:
    """Score every candidate of every question, in order.

    Questions are grouped in the same way wherever it starts, so that an interrupted run that goes
    on gets the same bits.

    Args:
        model: a causal LM.
        questions: candidates per question.
        first: number of questions that are not asked for.
        packed: share trunks in one sequence, or one padded row per candidate; None decides by
            ``takes_packed_mask``.
    Yields:
        One score per candidate, question by question.
    """
    packed = takes_packed_mask(model) if packed is None else packed
    end = 0
    for group in _groups(questions):
        start, end = end, end + len(group)
        if end <= first:
            continue
        candidates = [request for question in group for request in question]
        if packed:
            pack = pack_questions(group)
            hidden_PD = _packed_hidden(model, pack)
            rows: Sequence[Sequence[int]] = pack.rows
        else:
            hidden_PD, rows = _padded_hidden(model, candidates)
        scores = iter(_scores(model, hidden_PD, rows, candidates))
        for number, question in enumerate(group, start=start):
            found = tuple(next(scores) for _ in question)
            if number >= first:
                yield found


def pack_questions(questions: Sequence[Sequence[Request]]) -> Pack:
    """Lay questions out in one sequence: the trunk of each, then its branches.

    Args:
        questions: candidates per question; each question has at least one.
    """
    ids: list[int] = []
    positions: list[int] = []
    owners: list[tuple[int, int]] = []
    rows: list[tuple[int, ...]] = []

    def append(question: int, branch: int, tokens: Sequence[int], start: int) -> list[int]:
        """Put tokens down from position ``start``; their indices in the sequence."""
        first = len(ids)
        ids.extend(tokens)
        positions.extend(range(start, start + len(tokens)))
        owners.extend([(question, branch)] * len(tokens))
        return list(range(first, len(ids)))

    for question, candidates in enumerate(questions):
        inputs = [request.inputs for request in candidates]
        shared = _common_prefix(inputs)
        trunk = append(question, TRUNK, inputs[0][:shared], 0)
        for branch, request in enumerate(candidates):
            own = append(question, branch, request.inputs[shared:], shared)
            rows.append(tuple((trunk + own)[-request.scored :]))
    question_P, branch_P = torch.tensor(owners, device="cpu").T
    return Pack(
        torch.tensor(ids, device="cpu"),
        torch.tensor(positions, device="cpu"),
        question_P,
        branch_P,
        tuple(rows),
    )


def visible(pack: Pack) -> Tensor:
    """Which tokens a token sees, bool, (P, P): earlier ones of its question's trunk or its branch.

    ``visible[i, j] = j <= i and question_i == question_j and branch_j in {TRUNK, branch_i}``
    """
    index_P = torch.arange(pack.input_ids_P.numel(), device="cpu")
    same_question = pack.question_P[:, None] == pack.question_P[None, :]
    on_path = (pack.branch_P[None, :] == TRUNK) | (pack.branch_P[:, None] == pack.branch_P[None, :])
    return same_question & on_path & (index_P[None, :] <= index_P[:, None])


def _packed_hidden(model: PreTrainedModel, pack: Pack) -> Tensor:
    """Hidden states of a pack, (P, D)."""
    # Additive, not boolean: eager attention adds the mask, sdpa takes either.
    visible_PP = visible(pack)
    mask_PP = torch.zeros(visible_PP.shape, dtype=model.dtype, device="cpu")
    mask_PP.masked_fill_(~visible_PP, torch.finfo(model.dtype).min)
    return final_hidden(
        model,
        pack.input_ids_P[None],
        position_ids_BT=pack.position_ids_P[None].to(model.device),
        attention_mask=mask_PP[None, None].to(model.device),
    )[0]


def _padded_hidden(
    model: PreTrainedModel, candidates: Sequence[Request]
) -> tuple[Tensor, list[range]]:
    """Hidden states of one row per candidate, flattened to (B * T, D), and the scoring rows.

    Padding stands on the right, where causal attention keeps it out of sight without a mask.
    """
    width = max(len(request.inputs) for request in candidates)
    ids_BT = torch.zeros(len(candidates), width, dtype=torch.int64, device="cpu")
    rows = []
    for row, request in enumerate(candidates):
        length = len(request.inputs)
        ids_BT[row, :length] = torch.tensor(request.inputs, device="cpu")
        rows.append(range(row * width + length - request.scored, row * width + length))
    return final_hidden(model, ids_BT).flatten(0, 1), rows


def _scores(
    model: PreTrainedModel,
    hidden_PD: Tensor,
    rows: Sequence[Sequence[int]],
    candidates: Sequence[Request],
) -> list[Score]:
    """Scores from the hidden states that predict each continuation."""
    index_N = torch.tensor([index for indices in rows for index in indices], device="cpu")
    target_N = torch.tensor(
        [t for request in candidates for t in request.tokens[-request.scored :]], device="cpu"
    )
    log_p, greedy = [], []
    device = hidden_PD.device
    chunk = chunk_tokens(model)
    for index_C, target_C in zip(
        index_N.to(device).split(chunk), target_N.to(device).split(chunk), strict=True
    ):
        logits_CV = project(model, hidden_PD[index_C])
        log_p_CV = functional.log_softmax(logits_CV, dim=-1)
        log_p.append(log_p_CV.gather(-1, target_C[:, None])[:, 0].double().cpu())
        greedy.append((logits_CV.argmax(-1) == target_C).cpu())
    lengths = [request.scored for request in candidates]
    log_p_by_candidate = torch.cat(log_p).split(lengths)
    greedy_by_candidate = torch.cat(greedy).split(lengths)
    for values in log_p_by_candidate:
        require_usable(model, -float(values.mean()), "a task's continuation")
    return [
        Score(float(values.sum()), bool(hits.all()))
        for values, hits in zip(log_p_by_candidate, greedy_by_candidate, strict=True)
    ]


def _groups(questions: Sequence[Sequence[Request]]) -> Iterator[list[Sequence[Request]]]:
    """Consecutive questions of about ``PACK_TOKENS`` tokens in all, at least one each."""
    group: list[Sequence[Request]] = []
    size = 0
    for question in questions:
        inputs = [request.inputs for request in question]
        cost = sum(map(len, inputs)) - (len(inputs) - 1) * _common_prefix(inputs)
        if group and size + cost > PACK_TOKENS:
            yield group
            group, size = [], 0
        group.append(question)
        size += cost
    if group:
        yield group


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences have in common."""
    return sum(1 for _ in takewhile(lambda t: len(set(t)) == 1, zip(*sequences, strict=False)))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The BOS token, when the tokenizer puts it before a text by default."""
    bos = tokenizer.bos_token_id
    starts_with_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return (int(bos),) if starts_with_bos else ()


def _stand_in(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The token that stands for an empty context."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise WeaverError(
        f"nothing stands before {text[:60]!r}",
        why="the context is empty and the tokenizer has neither a BOS nor an EOS token",
        fix="give the item a context, or set bos_token in the tokenizer's configuration",
    )
