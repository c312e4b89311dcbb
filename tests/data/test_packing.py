from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from weaver.data.packing import (
    MIN_SAMPLE_TOKENS,
    PackedTokens,
    _shares,
    _token_ids,
    group_samples,
    pack,
    windows,
)
from weaver.data.sources import DataSpec, Document
from weaver.errors import WeaverError

BOS, EOS = 256, 257


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
) -> PackedTokens:
    return pack(specs, tokenizer, sequence_length=length, tokens=tokens, seed=seed, data_dir=None)


def samples_of(packed: PackedTokens) -> list[list[int]]:
    """The tokens of every sample."""
    flat, ids = packed.input_ids_WT.flatten(), packed.sample_ids_WT.flatten()
    return [flat[ids == m].tolist() for m in range(packed.sample_groups_M.numel())]


def tokens_per_group(packed: PackedTokens) -> dict[str, int]:
    counts = packed.sample_groups_M[packed.sample_ids_WT.flatten()].bincount()
    return dict(zip(packed.groups, counts.tolist(), strict=True))


def test_the_tiny_tokenizer_survives_saving(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again("é <eos>", add_special_tokens=False)["input_ids"]
    assert ids == [0xC3, 0xA9, 0x20, EOS]
    assert again.decode(ids[:2]) == "é"
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (BOS, EOS, 258)


def test_one_document_by_hand(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    packed = run([source(tmp_path / "a.jsonl", {"g": ["abcde"]})], tiny_tokenizer, 3, 8)
    # Two windows of three. A sample has at most three tokens, the separator counted in, and the
    # rest of the document follows as a second sample.
    assert packed.input_ids_WT.tolist() == [[97, 98, EOS], [99, 100, EOS]]
    assert packed.sample_ids_WT.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert packed.sample_groups_M.tolist() == [0, 0]
    assert packed.groups == ("g",)
    assert packed.input_ids_WT.dtype == packed.sample_ids_WT.dtype == torch.int64


def test_a_tokenizer_that_writes_bos_separates_by_bos(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    packed = run([source(tmp_path / "a.jsonl", {"g": ["ab", "ab"]})], tiny_tokenizer, 6, 6)
    assert packed.input_ids_WT.tolist() == [[BOS, 97, 98, BOS, 97, 98]]


def test_without_special_tokens_nothing_separates(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.eos_token = None
    packed = run([source(tmp_path / "a.jsonl", {"g": ["ab", "ab"]})], tiny_tokenizer, 4, 4)
    assert packed.input_ids_WT.tolist() == [[97, 98, 97, 98]]


def test_every_group_is_represented_under_a_small_budget(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = {"long": ["x" * 5000] * 50, **{f"short{i}": ["y" * 200] for i in range(7)}}
    packed = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 256, 512)
    # 512 tokens for 8 groups: 64 tokens each.
    assert tokens_per_group(packed) == dict.fromkeys(texts, 64)


def test_a_sample_is_not_shorter_than_the_minimum(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = {f"g{i}": ["y" * 200] for i in range(40)}
    packed = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 64, 320)
    assert [len(sample) for sample in samples_of(packed)] == [MIN_SAMPLE_TOKENS] * 10


def test_the_rest_of_a_long_document_waits_for_the_others(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = {"g": ["a" * 63 + "A" * 63, "b" * 63 + "B" * 63, "c" * 63]}
    packed = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 64, 192)
    assert sorted(chr(sample[0]) for sample in samples_of(packed)) == ["a", "b", "c"]
    packed = run([source(tmp_path / "a.jsonl", texts)], tiny_tokenizer, 64, 320)
    assert sorted(chr(sample[0]) for sample in samples_of(packed)) == ["A", "B", "a", "b", "c"]


def test_weights_are_kept_to_the_token(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    first = source(tmp_path / "a.jsonl", {"a": ["a" * 50] * 50})
    second = source(tmp_path / "b.jsonl", {"b": ["b" * 50] * 50})
    specs = [DataSpec(first.location, 0.3), DataSpec(second.location, 0.1)]
    packed = run(specs, tiny_tokenizer, 100, 1050)
    assert packed.input_ids_WT.shape == (10, 100)
    assert tokens_per_group(packed) == {"a": 750, "b": 250}
    # The sources are mixed, not one after the other.
    assert 0 < (packed.input_ids_WT[:5] == ord("b")).sum() < 245


def test_groups_of_one_name_are_one_group(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    specs = [source(tmp_path / f"{name}.jsonl", {"g": [name * 9]}) for name in "ab"]
    packed = run(specs, tiny_tokenizer, 10, 20)
    assert packed.groups == ("g",)
    assert packed.sample_groups_M.tolist() == [0, 0]


def test_windows_depend_on_the_seed_alone(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = {g: [f"{g} document {i}" for i in range(20)] for g in ("one", "two", "three")}
    specs = [source(tmp_path / "a.jsonl", texts)]
    first, again, other = (run(specs, tiny_tokenizer, 16, 256, seed) for seed in (1, 1, 2))
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    assert not torch.equal(first.input_ids_WT, other.input_ids_WT)


def test_packed_tokens_survive_the_way_to_disk(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    packed = run([source(tmp_path / "a.jsonl", {"é": ["abcdef"]})], tiny_tokenizer, 3, 6)
    again = PackedTokens.build(packed.tensors(), packed.scalars())
    assert again.groups == ("é",)
    assert torch.equal(again.sample_ids_WT, packed.sample_ids_WT)


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    st.integers(5000, 20000),
)
def test_shares_add_up(weights: list[int], total: int) -> None:
    specs = [DataSpec(f"{i}", float(weight)) for i, weight in enumerate(weights)]
    shares = _shares(specs, total)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) <= 1


def test_too_little_data_says_how_many_tokens_would_do(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    short = source(tmp_path / "a.jsonl", {"g": ["abcdefg"] * 4})
    with pytest.raises(WeaverError, match="has 32 tokens, 100 are wanted") as caught:
        run([short], tiny_tokenizer, 10, 100)
    assert "--tokens 30" in caught.value.fix
    assert run([short], tiny_tokenizer, 10, 30).input_ids_WT.shape == (3, 10)
    with pytest.raises(WeaverError, match="has 32 tokens, 40 are wanted") as caught:
        run([short], tiny_tokenizer, 40, 40)
    assert "a smaller --sequence-length" in caught.value.fix


def test_sizes_that_cannot_be(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spec = source(tmp_path / "a.jsonl", {"g": ["abc"]})
    with pytest.raises(WeaverError, match="8 tokens do not fill one window of 9"):
        run([spec], tiny_tokenizer, 9, 8)
    with pytest.raises(WeaverError, match="gets none of 8 tokens"):
        run([spec, DataSpec(spec.location, 1e-9)], tiny_tokenizer, 4, 8)
    with pytest.raises(ValueError, match="needs a source"):
        run([], tiny_tokenizer, 4, 8)


@pytest.mark.parametrize(
    ("sample_ids", "groups", "names", "message"),
    [
        ([[0, 0, 1]], [0, 0], ["g"], "one shape"),
        ([[0, 2]], [0, 0, 0], ["g"], "sample ids are not exactly 0..2"),
        ([[0, 1]], [0, 2], ["g", "h"], "groups of the samples are not exactly 0..1"),
    ],
)
def test_packed_tokens_are_validated(
    sample_ids: list[list[int]], groups: list[int], names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PackedTokens(
            torch.zeros(1, 2, dtype=torch.int64),
            torch.tensor(sample_ids),
            torch.tensor(groups),
            json.dumps(names),
        )


def test_windows_by_hand(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("abc", "g"), Document("de", "g")]
    every = windows(documents, tiny_tokenizer, sequence_length=3, limit=None)
    assert every.tolist() == [[97, 98, 99], [10, 10, 100]]
    first = windows(documents, tiny_tokenizer, sequence_length=3, limit=1)
    assert first.tolist() == [[97, 98, 99]]


def test_windows_let_groups_take_turns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("a", "g"), Document("b", "g"), Document("c", "h"), Document("d", "g")]
    ids = windows(documents, tiny_tokenizer, sequence_length=10, limit=None)
    assert tiny_tokenizer.decode(ids[0]) == "a\n\nc\n\nb\n\nd"


def test_windows_need_one_window(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(WeaverError, match="3 tokens do not fill one window of 4"):
        windows([Document("abc", "g")], tiny_tokenizer, sequence_length=4, limit=None)
    with pytest.raises(ValueError, match="limit are positive"):
        windows([Document("abc", "g")], tiny_tokenizer, sequence_length=2, limit=0)


class Watched:
    """A tokenizer that notes the lengths of the texts that it is given."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner
        self.seen: list[int] = []

    def __call__(self, text: str, **options: object) -> object:
        self.seen.append(len(text))
        return self.inner(text, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_no_more_of_a_long_text_is_read_than_is_wanted(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The same tokens as of the whole text, of which only the first part is ever tokenised."""
    for text in ("word " * 100_000, "x" * 500_000):
        watched: Any = Watched(tiny_tokenizer)
        expected = tiny_tokenizer(text[:40])["input_ids"]
        assert _token_ids(watched, text, 40) == expected[:40]
        assert max(watched.seen) < 5000
    assert _token_ids(tiny_tokenizer, "short", 40) == tiny_tokenizer("short")["input_ids"]


def test_further_pieces_of_a_long_text_are_read_as_they_are_taken(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = "".join(chr(97 + n * n % 26) for n in range(500_000))
    watched: Any = Watched(tiny_tokenizer)
    pieces = group_samples([Document(text, "g")], watched, 40)
    tokens = [token for _ in range(8) for token in next(pieces).tokens]
    assert max(watched.seen) < 10_000
    # Every sample ends on a separator.
    expected = tiny_tokenizer(text[:400])["input_ids"]
    assert [t for t in tokens if t != tiny_tokenizer.eos_token_id] == expected[: 8 * 39]
