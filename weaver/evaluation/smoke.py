"""Smoke test of a converted model: a few hundred tokens tell whether it is a language model still.

It does not say how good a conversion is; ``eval`` does. Dense and converted model read the same
held-out text and write on from the same prompts, one after the other: of the dense one only the
log-probabilities and the tokens are kept, so that the two need not be in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from weaver.artifacts.results import ContinuedText, SmokeResult
from weaver.data.packing import windows
from weaver.data.sources import Document, read_documents
from weaver.evaluation.generation import NGRAM, Decoding, generate_ids, repetition
from weaver.evaluation.logits import final_hidden, project
from weaver.evaluation.perplexity import token_kl

# Tokens of each window of text, and in front of what is written on.
WINDOW_TOKENS = 48
PROMPT_TOKENS = 32
# Prompts that are written on: as many as the CPU kernel decodes row by row.
PROMPTS = 4
NEW_TOKENS = 24

# Of SmolLM2-135M: weave 0.1 to 0.5 nats per token, a random split at 25% sparsity 1.8, at 50% 6.4;
# 2 nats go with about ten times the perplexity (docs/results.md, docs/results_published.md).
KL_BOUND = 2.0
# A small dense model repeats itself too under greedy decoding, and by chance one text more than
# another: 14% of SmolLM2-135M's 4-grams, up to 40% after conversions with a KL below 1, 64% with
# all experts switched off. So there are two bounds: what only text that runs in circles after
# nearly every prompt reaches, and clearly more than the dense model. Drawing tokens instead would
# hide it: hardly anything repeats then, even without any of the experts.
REPETITION_BOUND = 0.6
REPETITION_MARGIN = 0.25


@dataclass(frozen=True)
class Answers:
    """Answers of a model to the smoke test: log-probabilities and greedy continuations.

    Args:
        log_p: per window the log-probabilities of every next token, float32, (T - 1, V).
        continuations: tokens written on after each prompt.
    """

    log_p: tuple[Tensor, ...]
    continuations: tuple[tuple[int, ...], ...]


def smoke_windows(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The beginning of one held-out document of every domain, int64, (W, WINDOW_TOKENS)."""
    first: dict[str, Document] = {}
    for document in read_documents("builtin:held-out", None):
        first.setdefault(document.group, document)
    return torch.cat(
        [
            windows([document], tokenizer, sequence_length=WINDOW_TOKENS, limit=1)
            for document in first.values()
        ]
    )


def answer(model: PreTrainedModel, windows_WT: Tensor) -> Answers:
    """Read every window and write on from the beginnings of the first ones."""
    return Answers(tuple(_log_probabilities(model, windows_WT)), _continuations(model, windows_WT))


def smoke_result(
    dense: Answers,
    converted: PreTrainedModel,
    windows_WT: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> SmokeResult:
    """The converted model beside what the dense one answered, and whether it is degenerate.

    KL is the mean of ``token_kl`` over all positions; repetition that of ``repetition`` over the
    prompts, greedy decoding, ``NEW_TOKENS`` each. Values are rounded to four decimals.

    Args:
        dense: the dense model's answers to the same windows.
        converted: the converted model, with the same vocabulary.
        windows_WT: the text, int64, (W, T).
        tokenizer: of both, which turns what they write into text.

    Returns:
        The values; KL is None if a logit of either model is not finite.
    """
    total, tokens, dense_bad, bad = 0.0, 0, 0, 0
    for theirs_NV, ours_NV in zip(
        dense.log_p, _log_probabilities(converted, windows_WT), strict=True
    ):
        tokens += len(theirs_NV)
        dense_bad += _not_finite(theirs_NV)
        bad += _not_finite(ours_NV)
        total += float(token_kl(theirs_NV, ours_NV).double().sum())
    kl = None if bad or dense_bad else round(max(total / tokens, 0.0), 4)
    written = _continuations(converted, windows_WT)
    ours = _mean_repetition(written)
    theirs = _mean_repetition(dense.continuations)
    return SmokeResult(
        tokens=tokens,
        kl=kl,
        not_finite=bad,
        dense_not_finite=dense_bad,
        repetition=ours,
        dense_repetition=theirs,
        texts=tuple(
            ContinuedText(
                prompt=tokenizer.decode(prompt_T[:PROMPT_TOKENS]),
                dense=tokenizer.decode(list(before)),
                converted=tokenizer.decode(list(after)),
            )
            for prompt_T, before, after in zip(
                windows_WT[:PROMPTS], dense.continuations, written, strict=True
            )
        ),
        degenerate=(
            *_finite_problems("dense", dense_bad, tokens),
            *_finite_problems("converted", bad, tokens),
            *kl_problems(kl),
            *repetition_problems(ours, theirs),
        ),
    )


def kl_problems(kl: float | None) -> list[str]:
    """Return a message if a KL(dense || converted), nats per token, is above ``KL_BOUND``."""
    if kl is None or kl <= KL_BOUND:
        return []
    return [f"KL to the dense model is {kl:.2f} nats per token, above {KL_BOUND:g}"]


def repetition_problems(converted: float, dense: float) -> list[str]:
    """Return a message if the converted model repeats itself far more than the dense one.

    Degenerate is ``r > REPETITION_BOUND and r > r_dense + REPETITION_MARGIN``.

    Args:
        converted, dense: share of repeated 4-grams in the continuations of the same prompts.
    """
    if converted <= REPETITION_BOUND or converted <= dense + REPETITION_MARGIN:
        return []
    return [
        f"{converted:.0%} of the {NGRAM}-grams that it writes repeat earlier ones, "
        f"of the dense model's {dense:.0%}"
    ]


def _finite_problems(which: str, count: int, tokens: int) -> list[str]:
    if count == 0:
        return []
    return [f"logits of the {which} model are not finite at {count} of {tokens} tokens"]


def _log_probabilities(model: PreTrainedModel, windows_WT: Tensor) -> Iterator[Tensor]:
    # One forward reads the weights once; the vocabulary meets one window at a time.
    for hidden_TD in final_hidden(model, windows_WT):
        yield functional.log_softmax(project(model, hidden_TD[:-1]), dim=-1)


def _not_finite(log_p_NV: Tensor) -> int:
    """Positions with NaN or infinity; log-softmax of finite float32 logits is finite."""
    return int((~log_p_NV.isfinite().all(-1)).sum())


def _continuations(model: PreTrainedModel, windows_WT: Tensor) -> tuple[tuple[int, ...], ...]:
    prompts_PT = windows_WT[:PROMPTS, :PROMPT_TOKENS]
    new_PN = generate_ids(model, prompts_PT, Decoding(NEW_TOKENS), ends=False)
    return tuple(tuple(row) for row in new_PN.tolist())


def _mean_repetition(continuations: Sequence[Sequence[int]]) -> float:
    return round(sum(map(repetition, continuations)) / len(continuations), 4)
