"""Windows that hold text of one group alone: as many of each, and some more of each held out.

Shape legend: W windows, T tokens of a window, M samples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weaver.artifacts.record import TensorRecord
from weaver.data.chat import read_texts
from weaver.data.packing import PackedTokens, Sample, by_group, group_samples
from weaver.data.sources import DataSpec
from weaver.errors import WeaverError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of each group that are kept apart from the calibration, as far as its text goes.
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class GroupWindows(TensorRecord):
    """Windows of text that knows its group and is not among the calibration tokens.

    Args:
        input_ids_WT: token ids, int64, (W, T); W may be 0.
        groups_W: group of each window, int64, (W,); indexes the groups of the calibration.
    """

    input_ids_WT: Tensor
    groups_W: Tensor

    def of(self, group: int) -> Tensor:
        """The windows of one group, (w, T)."""
        return self.input_ids_WT[self.groups_W == group]


def pack_groups(
    specs: Sequence[DataSpec],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    tokens: int,
    seed: int,
    data_dir: Path | None,
) -> tuple[PackedTokens, GroupWindows]:
    """Fill the same number of windows with text of every group, and some more with other text.

    Each group gets ``tokens // T // G`` windows. A window holds samples of one group, cut and
    separated as by ``pack``, in a seeded order of the group's documents; the windows of the groups
    take turns. What follows in that order are the group's held-out windows, up to
    ``HELD_OUT_TOKENS``; none of their tokens is calibrated on.

    Args:
        specs: the sources; a group may have text in several of them.
        tokenizer: turns text into ids.
        sequence_length: T.
        tokens: the budget of all groups together; what does not divide is left out.
        seed: equal seeds give equal windows.
        data_dir: see ``read_documents``.

    Returns:
        The calibration windows, (G * w, T), and the held-out ones.

    Raises:
        WeaverError: there are fewer than two groups, a source has a weight, the budget is less than
            a window per group, or a group has too little text.
    """
    _require_no_weights(specs)
    documents = [
        document for spec in specs for document in read_texts(spec.location, tokenizer, data_dir)
    ]
    groups = by_group(documents)
    names = [members[0].group for members in groups]
    each = _windows_each(names, tokens, sequence_length)
    fitted: list[list[Sample]] = []
    held_out: list[Tensor] = []
    for name, members in zip(names, groups, strict=True):
        random.Random(f"{seed}:{name}").shuffle(members)
        queue = group_samples(members, tokenizer, sequence_length)
        samples = _take(queue, each * sequence_length)
        _require_text(name, samples, each, sequence_length, len(names))
        fitted.append(samples)
        rest = [token for sample in _take(queue, HELD_OUT_TOKENS) for token in sample.tokens]
        count = len(rest) // sequence_length
        held_out.append(
            torch.tensor(rest[: count * sequence_length], dtype=torch.int64, device="cpu").view(
                count, -1
            )
            if count
            else torch.empty(0, sequence_length, dtype=torch.int64, device="cpu")
        )
    counts = torch.tensor([len(windows) for windows in held_out], device="cpu")
    apart = GroupWindows(
        torch.cat(held_out), torch.arange(len(names), device="cpu").repeat_interleave(counts)
    )
    return _interleaved(names, fitted, each, sequence_length), apart


def _interleaved(
    names: Sequence[str], fitted: Sequence[Sequence[Sample]], each: int, sequence_length: int
) -> PackedTokens:
    ids, owners, groups, first = [], [], [], 0
    for number, samples in enumerate(fitted):
        lengths = torch.tensor([len(sample.tokens) for sample in samples], device="cpu")
        owner_n = torch.arange(first, first + len(samples), device="cpu").repeat_interleave(lengths)
        ids.append(
            torch.tensor([t for sample in samples for t in sample.tokens], device="cpu").view(
                each, -1
            )
        )
        owners.append(owner_n.view(each, -1))
        groups += [number] * len(samples)
        first += len(samples)
    # A window of each group in turn: whoever holds stretches of the stream out has all groups.
    shape = (each * len(names), sequence_length)
    owners_WT = torch.stack(owners, dim=1).view(shape)
    # Samples are numbered in the order of the stream.
    order_M = torch.full((first,), owners_WT.numel(), device="cpu").scatter_reduce(
        0, owners_WT.flatten(), torch.arange(owners_WT.numel(), device="cpu"), "amin"
    )
    ranked_M = order_M.argsort()
    return PackedTokens(
        input_ids_WT=torch.stack(ids, dim=1).view(shape),
        sample_ids_WT=ranked_M.argsort()[owners_WT],
        sample_groups_M=torch.tensor(groups, device="cpu")[ranked_M],
        groups_json=json.dumps(list(names), ensure_ascii=False),
    )


def _take(queue: Iterator[Sample], tokens: int) -> list[Sample]:
    """The next samples, up to a number of tokens; the last one is cut."""
    taken: list[Sample] = []
    while tokens > 0:
        sample = next(queue, None)
        if sample is None:
            break
        taken.append(Sample(sample.tokens[:tokens], sample.group))
        tokens -= len(taken[-1].tokens)
    return taken


def _require_no_weights(specs: Sequence[DataSpec]) -> None:
    weighted = [spec.location for spec in specs if spec.weight != 1]
    if weighted:
        raise WeaverError(
            f"a weight of {', '.join(weighted)} with --groups",
            why="every group gets the same number of tokens",
            fix="leave the weights out, or --groups",
        )


def _windows_each(names: Sequence[str], tokens: int, sequence_length: int) -> int:
    if len(names) < 2:
        raise WeaverError(
            f"the data has {len(names)} group: {', '.join(names)}",
            why="--groups keeps groups apart, and there is nothing to keep it apart from",
            fix="more --data: the group of a row is its task or domain, else the name of its file",
        )
    each = tokens // sequence_length // len(names)
    if each == 0:
        raise WeaverError(
            f"{tokens} tokens are less than a window of {sequence_length} for each of "
            f"{len(names)} groups",
            why="a window holds text of one group, and every group gets as many",
            fix=f"--tokens {len(names) * sequence_length}, or a smaller --sequence-length",
        )
    return each


def _require_text(
    name: str, samples: Sequence[Sample], each: int, sequence_length: int, groups: int
) -> None:
    found = sum(len(sample.tokens) for sample in samples)
    if found >= each * sequence_length:
        return
    enough = found // sequence_length * sequence_length * groups
    shorter = f"--tokens {enough}" if enough else "a smaller --sequence-length"
    raise WeaverError(
        f"group {name} has {found} tokens, {each * sequence_length} are wanted from it",
        why=f"each of {groups} groups gets as many",
        fix=f"{shorter}, or more data of this group",
    )
