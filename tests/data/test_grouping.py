"""Windows of one group each: by hand, and what makes groups comparable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from weaver.data import grouping
from weaver.data.grouping import GroupWindows, pack_groups
from weaver.data.packing import PackedTokens
from weaver.data.sources import DataSpec
from weaver.errors import WeaverError

EOS = 257


def source(path: Path, texts: dict[str, list[str]]) -> DataSpec:
    """A jsonl file with the given texts per group."""
    rows = [{"text": text, "task": group} for group, members in texts.items() for text in members]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(str(path), 1.0)


def run(
    specs: list[DataSpec],
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    tokens: int,
    seed: int = 0,
) -> tuple[PackedTokens, GroupWindows]:
    return pack_groups(
        specs, tokenizer, sequence_length=length, tokens=tokens, seed=seed, data_dir=None
    )


def test_two_groups_by_hand(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Two windows each of 3 tokens in turn; the last of 17 tokens fills none, the rest is kept."""
    specs = [source(tmp_path / "a.jsonl", {"x": ["abcdefghi"], "y": ["ABCDEFG"]})]
    packed, held_out = run(specs, tiny_tokenizer, 3, 17)
    assert packed.groups == ("x", "y")
    assert packed.input_ids_WT.tolist() == [
        [97, 98, EOS],
        [65, 66, EOS],
        [99, 100, EOS],
        [67, 68, EOS],
    ]
    assert packed.sample_ids_WT.tolist() == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]
    assert packed.sample_groups_M.tolist() == [0, 1, 0, 1]
    # "efghi" goes on as two windows (the last piece, "i", fills none), "EFG" as one.
    assert held_out.of(0).tolist() == [[101, 102, EOS], [103, 104, EOS]]
    assert held_out.of(1).tolist() == [[69, 70, EOS]]


def test_a_group_may_have_text_in_several_sources(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    specs = [
        source(tmp_path / "a.jsonl", {"x": ["a" * 9], "y": ["b" * 30]}),
        source(tmp_path / "b.jsonl", {"x": ["c" * 9], "z": ["d" * 30]}),
    ]
    packed, _ = run(specs, tiny_tokenizer, 4, 48)
    assert packed.groups == ("x", "y", "z")
    group_W = packed.sample_groups_M[packed.sample_ids_WT]
    # A window holds one group, and the groups take turns.
    assert bool((group_W == group_W[:, :1]).all())
    assert group_W[:, 0].tolist() == [0, 1, 2] * 4
    # Samples are numbered in the order of the stream.
    seen = list(dict.fromkeys(packed.sample_ids_WT.flatten().tolist()))
    assert seen == list(range(packed.sample_groups_M.numel()))
    x_tokens = set(packed.input_ids_WT[group_W[:, 0] == 0].flatten().tolist())
    assert x_tokens == {97, 99, EOS}


def test_held_out_windows_end_where_they_are_enough(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "HELD_OUT_TOKENS", 10)
    texts = {"x": [chr(97 + i) * 3 for i in range(20)], "y": ["A" * 7]}
    packed, held_out = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 4, 16)
    assert held_out.input_ids_WT.shape == (2, 4)
    assert held_out.groups_W.tolist() == [0, 0]
    assert held_out.of(1).shape == (0, 4)
    calibrated = set(packed.input_ids_WT.flatten().tolist()) - {EOS}
    assert not calibrated & (set(held_out.input_ids_WT.flatten().tolist()) - {EOS})
    again, _ = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 4, 16)
    assert torch.equal(again.input_ids_WT, packed.input_ids_WT)
    other, _ = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 4, 16, seed=1)
    assert not torch.equal(other.input_ids_WT, packed.input_ids_WT)


def test_what_cannot_be_kept_apart(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    one = source(tmp_path / "one.jsonl", {"x": ["a" * 50]})
    two = source(tmp_path / "two.jsonl", {"x": ["a" * 50], "y": ["b" * 5]})
    with pytest.raises(WeaverError, match="the data has 1 group: x"):
        run([one], tiny_tokenizer, 4, 16)
    with pytest.raises(WeaverError, match=r"7 tokens are less than a window of 4 for each of 2"):
        run([two], tiny_tokenizer, 4, 7)
    with pytest.raises(WeaverError, match="group y has 7 tokens, 8 are wanted from it") as caught:
        run([two], tiny_tokenizer, 4, 16)
    assert caught.value.fix.startswith("--tokens 8")
    with pytest.raises(WeaverError, match=r"a weight of .*two\.jsonl with --groups"):
        run([DataSpec(two.location, 2.0)], tiny_tokenizer, 4, 16)
