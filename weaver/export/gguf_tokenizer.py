"""The tokenizer keys of a GGUF file, from a folder with a Hugging Face tokenizer.

llama.cpp has its own tokenizers and only their data is in the file: "gpt2" is byte-level BPE, whose
rule for splitting text into words llama.cpp knows by name only, and "llama" is SentencePiece's BPE.
What is neither is refused: another rule would give other tokens without any error. Two things are
not part of the format: NFC, so that text which it would change has other tokens; and to begin with
one space where the text does already ("llama" puts another one before it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weaver.errors import WeaverError
from weaver.export.gguf_words import PRE_TOKENIZERS, UnknownRuleError, pre_tokenizer_name
from weaver.models.gguf import is_dequantised

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer keys of a GGUF file.

    Args:
        model: "gpt2" or "llama".
        pre: llama.cpp's name for the rule that splits text into words.
        tokens: text of every token, by id.
        types: kind of every token.
        merges: pairs in the order in which they are merged, with a space between; of "gpt2".
        scores: of every token, those with higher scores are merged first; of "llama".
        special_ids: ids by role: bos, eos, unk, pad.
        add_bos: every text starts with bos.
        add_eos: every text ends with eos.
        add_space_prefix: text is tokenised as if it began with a space; of "llama".
        chat_template: Jinja template, or templates by name.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | Mapping[str, str] | None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a file that is being written."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges)
        else:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.add_space_prefix)
        for role, token in self.special_ids.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        template = self.chat_template
        if isinstance(template, Mapping):
            writer.add_chat_template([{"name": k, "template": v} for k, v in template.items()])
        elif template is not None:
            writer.add_chat_template(template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read a tokenizer; ids without a token, up to ``size``, become unused tokens.

    Args:
        folder: holds ``tokenizer.json`` and ``tokenizer_config.json``.
        size: rows of the model's embedding.

    Raises:
        WeaverError: there is no such tokenizer, or llama.cpp has none like it.
    """
    tokenizer = _load(folder)
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model: dict[str, Any] = spec["model"]
    if model["type"] != "BPE":
        raise _unknown(folder, f"its model is {model['type']}, not BPE")
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: entry["content"] for i, entry in added.items()}
    if max(texts) >= size:
        raise WeaverError(
            f"{folder}: a tokenizer with ids up to {max(texts)} for {size} embeddings",
            why="every token needs a row of the embedding",
            fix="copy the tokenizer that belongs to the model into the folder",
        )
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    byte_fallback = bool(model["byte_fallback"])
    types = [
        _token_type(i, texts, added, unknown=model["unk_token"] if byte_fallback else None)
        for i in range(size)
    ]
    merges = [(str(left), str(right)) for left, right in model["merges"]]
    add_bos, add_eos = _added_ends(folder, tokenizer)
    return Vocabulary(
        model="llama" if byte_fallback else "gpt2",
        pre="default" if byte_fallback else _pre_tokenizer(folder, spec, merges),
        tokens=tokens,
        types=types,
        merges=[] if byte_fallback else _written_merges(merges, tokens[0]),
        scores=_scores(folder, tokens, types, merges) if byte_fallback else [],
        special_ids=_special_ids(folder, tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=byte_fallback and _space_prefix(folder, spec),
        chat_template=getattr(tokenizer, "chat_template", None),
    )


def _load(folder: Path) -> PreTrainedTokenizerBase:
    try:
        # Without it transformers may make up a tokenizer that knows no word.
        if not (folder / "tokenizer.json").is_file():
            raise ValueError("the folder holds no tokenizer.json")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WeaverError(
            f"{folder}: no tokenizer",
            why=str(error).splitlines()[0],
            fix="copy tokenizer.json and tokenizer_config.json into the folder",
        ) from error
    return tokenizer


def _unknown(folder: Path, reason: str) -> WeaverError:
    return WeaverError(
        f"{folder}: llama.cpp has no tokenizer like this one: {reason}",
        why="it knows SentencePiece's BPE with byte fallback and byte-level BPE with the words of "
        f"{', '.join(PRE_TOKENIZERS.values())}",
        fix="--to glm4-moe keeps the tokenizer as it is",
    )


def _token_type(
    token: int, texts: Mapping[int, str], added: Mapping[int, Any], unknown: str | None
) -> TokenType:
    if token not in texts:
        return TokenType.UNUSED
    if unknown is not None and texts[token] == unknown:
        return TokenType.UNKNOWN
    if token in added:
        return TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
    if unknown is not None and _BYTE_TOKEN.fullmatch(texts[token]):
        return TokenType.BYTE
    return TokenType.NORMAL


def _pre_tokenizer(folder: Path, spec: Mapping[str, Any], merges: Sequence[tuple[str, str]]) -> str:
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        raise _unknown(folder, f"it normalises text with {json.dumps(spec['normalizer'])}")
    try:
        return pre_tokenizer_name(
            spec["pre_tokenizer"],
            merges,
            ignore_merges=bool(spec["model"].get("ignore_merges")),
            from_gguf=is_dequantised(folder),
        )
    except UnknownRuleError as error:
        raise _unknown(folder, str(error)) from error


def _written_merges(merges: Sequence[tuple[str, str]], token: str) -> list[str]:
    """The format has no empty array; without merges, a pair that can never meet stands there."""
    pairs = merges or [(token * 2, token * 2)]
    return [f"{left} {right}" for left, right in pairs]


def _special_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    if ids["eos"] is None:
        raise WeaverError(
            f"{folder}: a tokenizer without a token for the end of a text",
            why="llama.cpp would take token 11 for it",
            fix='add "eos_token" to tokenizer_config.json',
        )
    # Without an entry llama.cpp takes token 11 for this one too, though it then never adds it.
    ids["bos"] = ids["eos"] if ids["bos"] is None else ids["bos"]
    return {role: int(token) for role, token in ids.items() if token is not None}


def _added_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether texts get a first and a last special token, seen on one text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add_bos in (False, True):
        for add_eos in (False, True):
            if [bos] * add_bos + plain + [eos] * add_eos == full:
                return add_bos, add_eos
    raise _unknown(folder, f"it makes {full} of a text of tokens {plain}, bos {bos}, eos {eos}")


def _scores(
    folder: Path,
    tokens: Sequence[str],
    types: Sequence[TokenType],
    merges: Sequence[tuple[str, str]],
) -> list[float]:
    """Scores with which llama.cpp merges in the order of the merges: minus the first one's place.

    llama.cpp merges two neighbours whenever a token reads like both together, so every token that
    could be put together must be made by a merge.
    """
    first: dict[str, int] = {}
    for place, (left, right) in enumerate(merges):
        first.setdefault(left + right, place)
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for text in normal - first.keys():
        if any(text[:i] in normal and text[i:] in normal for i in range(1, len(text))):
            raise _unknown(folder, f"none of its merges makes the token {text!r}")
    return [-float(first.get(text, 0)) for text in tokens]


def _space_prefix(folder: Path, spec: Mapping[str, Any]) -> bool:
    """Whether a text is tokenised as if it began with a space."""
    normalizer, splitter = spec["normalizer"], spec["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE} in steps
    prepends = {"type": "Prepend", "prepend": _SPACE} in steps
    known = len(steps) == replaces + prepends
    if known and replaces and splitter is None:
        return prepends
    if (
        known
        and splitter is not None
        and splitter["type"] == "Metaspace"
        and (splitter["replacement"], splitter["split"]) == (_SPACE, False)
    ):
        return prepends or splitter["prepend_scheme"] != "never"
    raise _unknown(folder, f"it treats spaces by {json.dumps([normalizer, splitter])}")
