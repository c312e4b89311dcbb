"""Documents to windows of token ids: a seeded mixture for calibration, plain text for perplexity.

Shape legend: W windows, T tokens of a window, M samples (documents or pieces of long ones).
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from weaver.artifacts.record import TensorRecord
from weaver.data.chat import read_texts
from weaver.data.sources import DataSpec, Document, parse_data_spec
from weaver.errors import WeaverError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With many groups and few tokens a sample is shorter than a window, but never shorter than this:
# the statistics of a shorter one say little.
MIN_SAMPLE_TOKENS = 32
# Characters of a long text that are read at first per token that is wanted, and tokens in front of
# a cut that are left out.
CHARACTERS, SPARE_TOKENS = 8, 64

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class PackedTokens(TensorRecord):
    """Windows of token ids that know which sample, and which group, every token is from.

    Args:
        input_ids_WT: token ids, int64, (W, T).
        sample_ids_WT: sample of each token, int64, (W, T); 0..M-1 in the order of the stream.
        sample_groups_M: group of each sample, int64, (M,); indexes ``groups``.
        groups_json: names of the groups, a JSON list.

    Raises:
        ValueError: the shapes do not agree, or an index has a gap or lies outside its range.
    """

    input_ids_WT: Tensor
    sample_ids_WT: Tensor
    sample_groups_M: Tensor
    groups_json: str

    def __post_init__(self) -> None:
        if self.input_ids_WT.dim() != 2 or self.input_ids_WT.shape != self.sample_ids_WT.shape:
            raise ValueError("input ids and sample ids are not two tensors of one shape (W, T)")
        _require_contiguous("sample ids", self.sample_ids_WT, self.sample_groups_M.numel())
        _require_contiguous("groups of the samples", self.sample_groups_M, len(self.groups))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(json.loads(self.groups_json))


@dataclass(frozen=True)
class Sample:
    """A stretch of one document: its token ids with their separators, and its group."""

    tokens: list[int]
    group: str


def pack(
    specs: Sequence[DataSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    tokens: int,
    seed: int,
    data_dir: Path | None,
) -> PackedTokens:
    """Fill ``tokens // sequence_length`` windows from a weighted mixture of sources.

    Each source supplies its weight's share of the tokens, to the token. Inside a source the groups
    take turns, each with its documents in a seeded order. A document gives one sample of at most
    ``min(T, share / groups)`` tokens (but at least ``MIN_SAMPLE_TOKENS``, where T allows), so that
    every group is represented and no long document eats the budget; the rest of a long document is
    used, as further samples, only when every document of its group had its turn. The samples of
    all sources are then shuffled, concatenated and cut into windows; a window may begin and end
    inside a sample.

    Samples are separated the way the model saw text begin or end: by a leading bos token if the
    tokenizer itself puts one before text (Llama, Gemma), else by a trailing eos token if there is
    one (Qwen, SmolLM), else by nothing.

    Args:
        specs: the sources and their weights, each with at least one token's share.
        tokenizer: turns text into ids.
        sequence_length: T.
        tokens: the budget; what does not fill a window is left out.
        seed: equal seeds give equal windows.
        data_dir: see ``read_documents``.

    Returns:
        The windows, int64, (tokens // T, T), with their samples and groups.

    Raises:
        ValueError: there is no source, or a size is not positive.
        WeaverError: T is larger than the budget, a source has too few tokens for its share, or its
            share is 0.
    """
    if not specs or sequence_length < 1 or tokens < 1:
        raise ValueError("needs a source, and positive sequence_length and tokens")
    if sequence_length > tokens:
        raise WeaverError(
            f"{tokens} tokens do not fill one window of {sequence_length}",
            why="every window has sequence_length tokens",
            fix=f"--tokens {sequence_length}, or a smaller --sequence-length",
        )
    shares = _shares(specs, tokens // sequence_length * sequence_length)
    samples: list[Sample] = []
    for spec, share in zip(specs, shares, strict=True):
        documents = read_texts(spec.location, tokenizer, data_dir)
        generator = random.Random(f"{seed}:{spec.location}")
        taken = _take(documents, tokenizer, generator, share, sequence_length)
        _require_share(spec, specs, taken, share, sequence_length)
        samples += taken
    random.Random(seed).shuffle(samples)
    return _to_windows(samples, sequence_length)


def read_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    limit: int | None,
    data_dir: Path | None = None,
) -> Tensor:
    """The windows of texts that are named as ``--data`` names them; see ``windows``.

    Raises:
        WeaverError: no such text, or it is shorter than one window.
    """
    documents = [
        document
        for text in texts
        for document in read_texts(parse_data_spec(text).location, tokenizer, data_dir)
    ]
    return windows(documents, tokenizer, sequence_length=sequence_length, limit=limit)


def windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    limit: int | None,
) -> Tensor:
    r"""Consecutive windows of the documents' text, for perplexity.

    The texts, joined with ``"\n\n"``, are tokenised once without special tokens and cut into
    windows that do not overlap; an incomplete last window is left out. Documents of several groups
    take turns, so that a limit does not keep the first group alone. Where the tokenizer itself puts
    a bos token before text, every window begins with one and holds T - 1 tokens of text: models
    trained that way (Gemma above all) predict poorly without it.

    Args:
        documents: the text.
        tokenizer: turns text into ids.
        sequence_length: T.
        limit: the largest number of windows, or None for all.

    Returns:
        Token ids, int64, (W, T).

    Raises:
        ValueError: ``sequence_length`` or ``limit`` is not positive.
        WeaverError: the text does not fill one window.
    """
    if sequence_length < 1 or (limit is not None and limit < 1):
        raise ValueError("sequence_length and limit are positive")
    text = "\n\n".join(document.text for document in _take_turns(by_group(documents)))
    prefix, _ = separators(tokenizer)
    body = sequence_length - len(prefix)
    ids = _token_ids(tokenizer, text, None if limit is None else limit * max(body, 1))
    count = len(ids) // body if body > 0 else 0
    if count == 0:
        raise WeaverError(
            f"{len(ids)} tokens do not fill one window of {sequence_length}",
            why="perplexity is measured on complete windows",
            fix=f"--sequence-length {max(len(ids), 2)}, or more data",
        )
    count = count if limit is None else min(count, limit)
    text_WB = torch.tensor(ids[: count * body], dtype=torch.int64, device="cpu").view(count, body)
    return torch.cat(
        [torch.tensor([prefix] * count, device="cpu").long().view(count, -1), text_WB], dim=1
    )


def _shares(specs: Sequence[DataSpec], total: int) -> list[int]:
    """Whole numbers of tokens per source that add up to ``total``."""
    weight = sum(spec.weight for spec in specs)
    ends = [
        round(total * sum(s.weight for s in specs[: i + 1]) / weight) for i in range(len(specs))
    ]
    shares = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for spec, share in zip(specs, shares, strict=True):
        if share == 0:
            raise WeaverError(
                f"{spec.location} gets none of {total} tokens",
                why=f"its weight is {spec.weight:g} of {weight:g}",
                fix="give it more weight, leave it out, or raise --tokens",
            )
    return shares


def _take(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    generator: random.Random,
    share: int,
    sequence_length: int,
) -> list[Sample]:
    """Samples of one source that add up to its share, or all of them if they do not reach it."""
    groups = by_group(documents)
    limit = min(sequence_length, max(share // len(groups), MIN_SAMPLE_TOKENS))
    for members in groups:
        generator.shuffle(members)
    samples: list[Sample] = []
    missing = share
    for sample in _take_turns([group_samples(group, tokenizer, limit) for group in groups]):
        samples.append(Sample(sample.tokens[:missing], sample.group))
        missing -= len(samples[-1].tokens)
        if missing == 0:
            break
    return samples


def group_samples(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Iterator[Sample]:
    """The first piece of every document, then the second of those that are longer, and so on."""
    around = separators(tokenizer)
    yield from _take_turns(_pieces(each, tokenizer, limit, *around) for each in documents)


def _pieces(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    prefix: list[int],
    suffix: list[int],
) -> Iterator[Sample]:
    """A document in samples of at most ``limit`` tokens, read no further than twice their end."""
    # A separator that fills the whole sample would leave no text.
    body = max(limit - len(prefix) - len(suffix), 1)
    start, wanted = 0, body + 1
    ids = _token_ids(tokenizer, document.text, wanted)
    while ids[start:]:
        yield Sample(prefix + ids[start : start + body] + suffix, document.group)
        start += body
        if len(ids) == wanted and len(ids) < start + body:
            wanted = 2 * (start + body)
            ids = _token_ids(tokenizer, document.text, wanted)


def by_group(documents: Sequence[Document]) -> list[list[Document]]:
    """The documents of each group; groups by their first document."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group, []).append(document)
    return list(groups.values())


def _take_turns(queues: Iterable[Iterable[ItemT]]) -> Iterator[ItemT]:
    """One item of each queue in turn, until all are empty."""
    waiting = deque(iter(queue) for queue in queues)
    while waiting:
        queue = waiting.popleft()
        for item in queue:
            yield item
            waiting.append(queue)
            break


def separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens around a text: BOS before it if the tokenizer adds it, else EOS.

    Returns:
        Token ids before the text, and those after it; at most one id in all.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos in tokenizer("", add_special_tokens=True)["input_ids"]:
        return [int(bos)], []
    return [], [] if eos is None else [int(eos)]


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, at_most: int | None = None
) -> list[int]:
    """Ids of a text, or the first of them: no more of a long text is read than gives so many."""
    characters = None if at_most is None else CHARACTERS * (at_most + SPARE_TOKENS)
    while at_most is not None and characters is not None and characters < len(text):
        # Up to a space, where pieces of text that become tokens end.
        head = text[: max(text.rfind(" ", characters // 2, characters), characters // 2)]
        first = _token_ids(tokenizer, head)
        # A cut changes tokens in front of it, if any, and only few.
        if len(first) >= at_most + SPARE_TOKENS:
            return first[:at_most]
        characters *= 4
    # verbose=False: a text longer than the model's context is expected here, it gets cut.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if at_most is None else ids[:at_most]


def _require_share(
    spec: DataSpec,
    specs: Sequence[DataSpec],
    samples: Sequence[Sample],
    share: int,
    sequence_length: int,
) -> None:
    found = sum(len(sample.tokens) for sample in samples)
    if found >= share:
        return
    weight = sum(other.weight for other in specs)
    enough = int(found * weight / spec.weight) // sequence_length * sequence_length
    shorter = f"--tokens {enough}" if enough else "a smaller --sequence-length"
    raise WeaverError(
        f"{spec.location} has {found} tokens, {share} are wanted from it",
        why=f"that is its share at weight {spec.weight:g} of {weight:g}",
        fix=f"{shorter}, or more data",
    )


def _to_windows(samples: Sequence[Sample], sequence_length: int) -> PackedTokens:
    names = dict.fromkeys(sample.group for sample in samples)
    index = {name: number for number, name in enumerate(names)}
    lengths = torch.tensor([len(sample.tokens) for sample in samples], device="cpu")
    flat = torch.tensor([token for sample in samples for token in sample.tokens], device="cpu")
    sample_ids = torch.arange(len(samples), device="cpu").repeat_interleave(lengths)
    return PackedTokens(
        input_ids_WT=flat.view(-1, sequence_length),
        sample_ids_WT=sample_ids.view(-1, sequence_length),
        sample_groups_M=torch.tensor([index[sample.group] for sample in samples], device="cpu"),
        groups_json=json.dumps(list(names), ensure_ascii=False),
    )


def _require_contiguous(what: str, indexes: Tensor, count: int) -> None:
    if not torch.equal(indexes.unique(), torch.arange(count, device="cpu")):
        raise ValueError(f"{what} are not exactly 0..{count - 1}")
