from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from tiny_stock import stock_model, stock_parts
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from weaver.errors import WeaverError
from weaver.export.gguf import write_gguf
from weaver.export.gguf_tokenizer import Vocabulary, read_vocabulary
from weaver.export.gguf_words import PRE_TOKENIZERS
from weaver.export.llamacpp import tokenise
from weaver.models.gguf import SOURCE_FILE

SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m"
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SIZE = 700

# As they stand in the tokenizer.json of published models.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
QWEN_3_5 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SINGLE_DIGITS = pre_tokenizers.Digits(individual_digits=True)
EXPRESSIONS = {
    "qwen2": QWEN_2,
    "qwen35": QWEN_3_5,
    "llama-bpe": LLAMA_3,
    "dbrx": LLAMA_3,
    "tekken": TEKKEN,
    "gpt-4o": GPT_4O,
}
TEXTS = [
    "It's 12345 apples, don't DON'T we'll\n\n  x = 3.14;\tfoo_bar(a[0])  ",
    "HTMLParser und Übergrößen: déjà-vu, naïve café",
    "  two  spaces,\r\n\r\n   and\n lines\n",
    "日本語のテスト 한국어 🙂🙂 2024年12月",
    "I'LL see... <<=>> /* ok */ // end\n\n\n\tx",
]
WITH_MARKS = "हिन्दी में"
IGNORING_MERGES = ("llama-bpe", "tekken")


def splitter(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that llama.cpp knows under a name."""
    if name == "gpt-2":
        return GPT_2
    if name == "smollm":
        return pre_tokenizers.Sequence([SINGLE_DIGITS, GPT_2])
    words = pre_tokenizers.Split(Regex(EXPRESSIONS[name]), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, as_bytes])


def train(tokenizer: Tokenizer, alphabet: list[str]) -> None:
    """Learn merges across words, so that a text is tokenised right only if split right."""
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 100,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=alphabet,
        show_progress=False,
        max_token_length=6,
    )
    tokenizer.train_from_iterator(
        [text for text in [*TEXTS, WITH_MARKS] for _ in range(3)], trainer
    )


def fast(tokenizer: Tokenizer, **special: Any) -> PreTrainedTokenizerFast:
    tokens = {"bos_token": BOS, "eos_token": EOS} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def byte_level(name: str = "gpt-2", *, ignore_merges: bool | None = None) -> Tokenizer:
    """A tokenizer with the words of a name; one of its tokens is not made by merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    train(trained, pre_tokenizers.ByteLevel.alphabet())
    spec = json.loads(trained.to_str())
    spec["model"]["vocab"]["Ġapples"] = len(spec["model"]["vocab"])
    spec["model"]["ignore_merges"] = (
        name in IGNORING_MERGES if ignore_merges is None else ignore_merges
    )
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.pre_tokenizer = splitter(name)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def sentencepiece() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as transformers makes them of a SentencePiece model.

    Unknown, ends, bytes, pieces in the order in which they were learned, characters; and a merge
    for every way to put a piece together.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    train(trained, [])
    learned = [t for t, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    pieces = [t for t in learned if len(t) > 1 and not t.startswith("<")]
    characters = [t for t in learned if len(t) == 1]
    tokens = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    return vocabulary, merges


def old_llama() -> Tokenizer:
    vocabulary, merges = sentencepiece()
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token=UNK, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    return tokenizer


def write(path: Path, folder: Path, size: int = SIZE) -> Path:
    """A file with the tokenizer of a folder and a model that fits it."""
    model = stock_model(vocab_size=size, num_hidden_layers=1, hidden_size=32)
    write_gguf(
        path,
        model.config,
        stock_parts(model),
        folder,
        quantisation="f16",
        name="tiny",
        on_part=lambda _: None,
    )
    return path


def read(folder: Path, tokenizer: Tokenizer | PreTrainedTokenizerFast) -> Vocabulary:
    saved = fast(tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer
    saved.save_pretrained(folder)
    return read_vocabulary(folder, SIZE)


def plain_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", PRE_TOKENIZERS.values())
def test_llama_cpp_splits_words_like_the_tokenizer(tmp_path: Path, name: str) -> None:
    assert read(tmp_path / "tokenizer", byte_level(name)).pre == name
    path = write(tmp_path / "tiny.gguf", tmp_path / "tokenizer")
    # llama.cpp's rules under these names leave combining marks out of the words.
    texts = TEXTS if name in ("tekken", "gpt-4o") else [*TEXTS, WITH_MARKS]
    assert tokenise(path, texts) == plain_ids(tmp_path / "tokenizer", texts)


def test_the_texts_tell_the_names_apart(tmp_path: Path) -> None:
    # Otherwise the test above would pass with any name.
    ids = set()
    for name in PRE_TOKENIZERS.values():
        read(tmp_path / name, byte_level(name))
        ids.add(str(plain_ids(tmp_path / name, [*TEXTS, WITH_MARKS])))
    assert len(ids) == len(PRE_TOKENIZERS)


@pytest.mark.parametrize("kind", ["normalizer", "metaspace", "class", "no-prefix"])
def test_llama_cpp_merges_like_a_sentencepiece_tokenizer(tmp_path: Path, kind: str) -> None:
    folder, tokenizer = tmp_path / "tokenizer", old_llama()
    saved: PreTrainedTokenizerFast | LlamaTokenizer = fast(tokenizer, unk_token=UNK)
    if kind in ("metaspace", "no-prefix"):
        tokenizer.normalizer = None
        scheme = "never" if kind == "no-prefix" else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        saved = fast(tokenizer, unk_token=UNK)
    if kind == "class":
        vocabulary, merges = sentencepiece()
        saved = LlamaTokenizer(vocab=vocabulary, merges=merges)
    saved.save_pretrained(folder)
    read_back = read_vocabulary(folder, SIZE)
    assert (read_back.model, read_back.pre) == ("llama", "default")
    assert read_back.add_space_prefix == (kind != "no-prefix")
    path = write(tmp_path / "tiny.gguf", folder)
    # Metaspace gives no second space to a text that begins with one; llama.cpp always adds it.
    texts = TEXTS if kind in ("normalizer", "no-prefix") else [text.lstrip() for text in TEXTS]
    assert tokenise(path, texts) == plain_ids(folder, texts)


def test_the_keys_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    vocabulary = {UNK: 0, BOS: 1, EOS: 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {"ab": 259, "abc": 260, "a": 261, "b": 262, "c": 263}
    merges = [("a", "b"), ("ab", "c")]
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token=UNK)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.add_special_tokens([UNK, BOS, EOS])
    tokenizer.add_tokens(["<tool>"])
    fast(tokenizer, unk_token=UNK).save_pretrained(tmp_path)
    read_back = read_vocabulary(tmp_path, 266)
    assert read_back.tokens[259:] == ["ab", "abc", "a", "b", "c", "<tool>", "[PAD265]"]
    assert read_back.scores[258:] == [0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert read_back.types == [
        *(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL),
        *[TokenType.BYTE] * 256,
        *[TokenType.NORMAL] * 5,
        *(TokenType.USER_DEFINED, TokenType.UNUSED),
    ]
    assert read_back.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    ends = (read_back.add_bos, read_back.add_eos, read_back.add_space_prefix)
    assert ends == (False, False, False)
    assert read_back.merges == []


def test_the_keys_of_a_byte_level_tokenizer(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path / "tiny.gguf", tmp_path / "tokenizer", size=261)
    fields = {
        key.removeprefix("tokenizer."): field.contents()
        for key, field in GGUFReader(path).fields.items()
        if key.startswith("tokenizer.")
    }
    tokens = fields.pop("ggml.tokens")
    assert tokens[0x41:0x44] == ["A", "B", "C"]
    assert tokens[256:] == ["<bos>", "<eos>", "<pad>", "[PAD259]", "[PAD260]"]
    assert fields.pop("ggml.token_type") == [1] * 256 + [3, 3, 3, 5, 5]
    assert fields == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        # Byte 0 is written as U+0100; without merges two of them never come together.
        "ggml.merges": ["\u0100\u0100 \u0100\u0100"],
        "ggml.add_space_prefix": False,
        "ggml.bos_token_id": 256,
        "ggml.eos_token_id": 257,
        "ggml.padding_token_id": 258,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "chat_template": "{{ messages }}",
        "chat_templates": ["tool_use"],
        "chat_template.tool_use": "{{ tools }}",
    }
    assert tokenise(path, ["\0\0A\u00e9<eos>"]) == [[0, 0, 0x41, 0xC3, 0xA9, 257]]


def test_ends_and_a_missing_bos(tmp_path: Path) -> None:
    both = byte_level()
    both.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    vocabulary = read(tmp_path / "both", both)
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, True)
    vocabulary = read(tmp_path / "none", fast(byte_level(), bos_token=None))
    assert (vocabulary.add_bos, vocabulary.add_eos) == (False, False)
    assert vocabulary.special_ids == {"bos": 2, "eos": 2}


def test_the_rule_of_a_gguf_file_is_told_by_its_merges(tmp_path: Path) -> None:
    tokenizer = byte_level()
    data = json.loads(tokenizer.to_str())
    assert read(tmp_path / "digits", tokenizer).pre == "gpt-2"
    (tmp_path / "digits" / SOURCE_FILE).write_text("{}")
    with pytest.raises(WeaverError, match="of which transformers keeps no rule"):
        read_vocabulary(tmp_path / "digits", SIZE)
    data["model"]["merges"] = [
        pair for pair in data["model"]["merges"] if not set("".join(pair)) & set("0123456789")
    ]
    kept = {left + right for left, right in data["model"]["merges"]}
    data["model"]["vocab"] = {
        token: i
        for token, i in data["model"]["vocab"].items()
        if len(token) == 1 or token in kept or token in (UNK, BOS, EOS)
    }
    fast(Tokenizer.from_str(json.dumps(data))).save_pretrained(tmp_path / "none")
    (tmp_path / "none" / SOURCE_FILE).write_text("{}")
    assert read_vocabulary(tmp_path / "none", SIZE).pre == "smollm"


def test_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), GPT_2])
    with pytest.raises(WeaverError, match="no tokenizer like this one") as caught:
        read(tmp_path / "punctuation", tokenizer)
    assert "Punctuation" in caught.value.what
    assert "the words of gpt-2, smollm, qwen2, qwen35, llama-bpe" in caught.value.why
    with pytest.raises(WeaverError, match="words that are tokens skip the merges"):
        read(tmp_path / "ignored", byte_level("qwen2", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(WeaverError, match='"add_prefix_space": true'):
        read(tmp_path / "prefix", tokenizer)
    tokenizer.pre_tokenizer = GPT_2
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(WeaverError, match=r"normalises text with .*Lowercase"):
        read(tmp_path / "lower", tokenizer)
    tokenizer.normalizer = normalizers.NFC()
    assert read(tmp_path / "nfc", tokenizer).pre == "gpt-2"


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({UNK: 0, BOS: 1, EOS: 2}, unk_token=UNK))
    with pytest.raises(WeaverError, match="its model is WordLevel, not BPE"):
        read(tmp_path / "words", words)
    split = old_llama()
    split.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    with pytest.raises(WeaverError, match=r"treats spaces by .*Metaspace"):
        read(tmp_path / "split", fast(split, unk_token=UNK))
    split.normalizer, split.pre_tokenizer = normalizers.NFKC(), None
    with pytest.raises(WeaverError, match=r"treats spaces by .*NFKC"):
        read(tmp_path / "nfkc", fast(split, unk_token=UNK))


def test_a_token_that_only_llama_cpp_would_make(tmp_path: Path) -> None:
    vocabulary, merges = sentencepiece()
    last = merges[-1][0] + merges[-1][1]
    kept = [pair for pair in merges if pair[0] + pair[1] != last]
    tokenizer = old_llama()
    tokenizer.model = models.BPE(vocabulary, kept, byte_fallback=True, unk_token=UNK)
    with pytest.raises(WeaverError, match=f"none of its merges makes the token {last!r}"):
        read(tmp_path, fast(tokenizer, unk_token=UNK))


def test_special_tokens_that_the_format_does_not_have(tmp_path: Path) -> None:
    tokenizer = byte_level()
    with pytest.raises(WeaverError, match="without a token for the end of a text") as caught:
        read(tmp_path / "endless", fast(tokenizer, eos_token=None))
    assert caught.value.why == "llama.cpp would take token 11 for it"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{UNK} {BOS} $A", special_tokens=[(UNK, 0), (BOS, 1)]
    )
    with pytest.raises(WeaverError, match=r"it makes \[0, 1, \d+\] of a text of tokens \[\d+\]"):
        read(tmp_path / "prefix", tokenizer)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    fast(byte_level()).save_pretrained(tmp_path)
    with pytest.raises(WeaverError, match=r"ids up to \d+ for 300 embeddings"):
        read_vocabulary(tmp_path, 300)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(WeaverError, match="no tokenizer") as caught:
        read_vocabulary(tmp_path, SIZE)
    assert caught.value.why == "the folder holds no tokenizer.json"


@pytest.mark.slow
@pytest.mark.real_model
def test_the_demo_model_has_the_keys_of_the_file_it_came_from(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(SMOLLM2, 49152)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "smollm")
    assert (len(vocabulary.tokens), len(vocabulary.merges)) == (49152, 48900)
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    ends = (vocabulary.add_bos, vocabulary.add_eos, vocabulary.add_space_prefix)
    assert ends == (False, False, False)
    assert vocabulary.types.count(TokenType.CONTROL) == 17
    assert vocabulary.types.count(TokenType.NORMAL) == 49152 - 17
    assert isinstance(vocabulary.chat_template, str)
    path = write(tmp_path / "smollm2.gguf", SMOLLM2, size=49152)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    text = "<|im_start|>user\nWhat's 1024 + 7? It's déjà vu.<|im_end|>\n"
    assert tokenise(path, [text]) == [tokenizer(text)["input_ids"]]
