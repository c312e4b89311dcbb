"""llama.cpp's names for the ways in which byte-level tokenizers split text into words.

A GGUF file holds only the name. A rule is recognised by the regular expressions of
``tokenizer.json``; what is not in the table has no name, and another one would give other tokens
without any error. llama.cpp's own rules for tekken and gpt-4o leave combining marks out of words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# The rules that published tokenizers split words by, in the notation of tokenizer.json.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_WORDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, marks: str = "") -> str:
    letters = rf"[\p{{L}}{marks}]" if marks else r"\p{L}"
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*|{_AFTER_WORDS}"
    )


def _cased_words(digits: str, suffix: str) -> str:
    head = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{head}{_UPPER}*{_LOWER}+{suffix}|{head}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_AFTER_WORDS}"
    )


_SINGLE_DIGITS = "single digits"
_DIGIT = frozenset("0123456789")
# Matches become words of their own, and nothing is lost where they cover the text.
_KEEPING = (("Isolated", False), ("Removed", True))
# llama.cpp's name for a rule, by its steps and by whether words that are tokens skip the merges.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_SINGLE_DIGITS, _GPT2), False): "smollm",
    ((_words(r"\p{N}"),), False): "qwen2",
    ((_words(r"\p{N}", r"\p{M}"),), False): "qwen35",
    ((_words(r"\p{N}{1,3}"),), True): "llama-bpe",
    ((_words(r"\p{N}{1,3}"),), False): "dbrx",
    ((_cased_words(r"\p{N}", ""),), True): "tekken",
    ((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),), False): "gpt-4o",
}


class UnknownRuleError(Exception):
    """llama.cpp has no such rule; the message says which."""


def pre_tokenizer_name(
    splitter: Mapping[str, Any] | None,
    merges: Sequence[tuple[str, str]],
    *,
    ignore_merges: bool,
    from_gguf: bool,
) -> str:
    """The name of a rule.

    Args:
        splitter: the entry ``pre_tokenizer`` of ``tokenizer.json``.
        merges: pairs of byte-level tokens.
        ignore_merges: words that are tokens skip the merges.
        from_gguf: transformers made the tokenizer out of a GGUF file, and forgot its rule.

    Raises:
        UnknownRuleError: it has none.
    """
    if not merges:
        # Then every byte is a token, in whatever words.
        return "gpt-2"
    steps = tuple(_steps(splitter))
    if from_gguf and steps == (_GPT2,):
        # Nothing but the merges tells the rule: a vocabulary that was trained on single digits, as
        # smollm's, joins none to anything.
        if any(not _DIGIT.isdisjoint(part) for pair in merges for part in pair):
            raise UnknownRuleError("it came from a GGUF file, of which transformers keeps no rule")
        steps = (_SINGLE_DIGITS, _GPT2)
    name = PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is None:
        skipping = " and words that are tokens skip the merges" if ignore_merges else ""
        raise UnknownRuleError(f"it splits text by {' then '.join(steps) or 'nothing'}{skipping}")
    return name


def _steps(step: Mapping[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer, each as its regular expression."""
    if step is None:
        return
    kind = step["type"]
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield _GPT2
    elif kind == "Digits" and step["individual_digits"]:
        yield _SINGLE_DIGITS
    elif kind == "Split" and (step["behavior"], step["invert"]) in _KEEPING:
        pattern = step["pattern"]
        yield pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])
    else:
        raise UnknownRuleError(f"it splits text by {json.dumps(step)}")
