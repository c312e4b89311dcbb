"""The edge: a model's folder is checked as a whole before any stage uses it.

Files stay inside the folder, sizes in ``config.json`` are numbers a model can have and those of the
tensors, and what transformers and tokenizers raise at the rest becomes one error that names the
file. Behind this module a model's files are trusted to agree with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from weaver.artifacts.store import read_json
from weaver.errors import WeaverError, shell

# Far above any published model; far below what makes a constructor run out of memory or time.
LIMITS = {
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**16,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**31,
    "num_experts": 2**16,
    "num_local_experts": 2**16,
    "n_routed_experts": 2**16,
    "num_experts_per_tok": 2**16,
}
POSITIVE = ("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_TOKENIZER_JSON = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_NO_CONFIG = "no configuration that transformers can load"
_NAME_A_MODEL = "pass a folder with config.json and *.safetensors, a .gguf file or a hub name"
Shapes = Mapping[str, Sequence[int]]


def inside(folder: Path, name: str) -> Path:
    """A file of a model's folder by its name, which stays there when links are followed.

    The hub's own cache is made of links: a snapshot's files may lie in the ``blobs`` beside it.

    Raises:
        WeaverError: the name, or the link that it names, leads out of the folder.
    """
    path, root = folder / name, folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    target = path.resolve()
    if Path(name).name != name or not any(target.is_relative_to(each) for each in allowed):
        raise WeaverError(
            f"{folder}: the file {name!r} lies outside, at {target}",
            why="a model's files lie in its folder; one from elsewhere would be copied along",
            fix=f"copy it there, if you trust it: {shell('cp', target, folder)}",
        )
    return path


def check_links(folder: Path) -> None:
    """Check that no entry of a model's folder is a link that leads out of it.

    Raises:
        WeaverError: one is, or the folder cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_symlink()]
    except OSError as error:
        raise WeaverError(
            f"{folder}: cannot be read", why=error.strerror or str(error), fix="check its rights"
        ) from error
    for name in names:
        inside(folder, name)


@contextmanager
def library_errors(what: str, fix: str) -> Iterator[None]:
    """Around calls into transformers and tokenizers: whatever they raise becomes one error.

    They raise whatever their parsing trips over, from ``KeyError`` to exceptions of their own.

    Args:
        what: the file or folder, and what is the matter with it.
        fix: the advice.

    Raises:
        WeaverError: with the first line of what was raised.
    """
    try:
        yield
    except WeaverError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception; signals and exits are not meant.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {' '.join(lines)[:300]}" if lines else type(error).__name__
        raise WeaverError(what, why=why, fix=fix) from error


def model_type_of(folder: Path) -> str:
    """``model_type`` of a model's folder.

    Raises:
        WeaverError: ``config.json`` is missing, damaged or names none.
    """
    return str(_read_values(folder)["model_type"])


def _read_values(folder: Path) -> dict[str, Any]:
    what, path = f"{folder}: {_NO_CONFIG}", inside(folder, "config.json")
    if not path.is_file():
        raise WeaverError(what, why="config.json is missing", fix=_NAME_A_MODEL)
    try:
        values = read_json(path, rebuild=_NAME_A_MODEL)
    except WeaverError as error:
        raise WeaverError(what, why=f"{error.what}: {error.why}", fix=error.fix) from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise WeaverError(what, why=f"{path.name} names no model_type", fix=_NAME_A_MODEL)
    return values


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model's folder.

    Raises:
        WeaverError: it is missing, damaged, or has a field that no model of its type can have.
    """
    values = _read_values(folder)
    check_fields(folder / "config.json", values)
    with library_errors(f"{folder}: {_NO_CONFIG}", _NAME_A_MODEL):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        return config


def check_fields(path: Path, values: Mapping[str, Any]) -> None:
    """Check the sizes and numbers of a configuration against what a model can have.

    Args:
        path: the file that they are from.
        values: its fields.

    Raises:
        WeaverError: naming the field.
    """
    for name, limit in LIMITS.items():
        value = values.get(name)
        # A model of embeddings alone can be run, though not converted.
        least = 0 if name == "num_hidden_layers" else 1
        if value is not None and not (_is_int(value) and least <= value <= limit):
            raise _bad_field(path, name, value, f"it is a whole number from {least} to {limit}")
    for name in POSITIVE:
        value = values.get(name)
        if value is not None and not (_is_finite(value) and value > 0):
            raise _bad_field(path, name, value, "it is a positive number")
    _check_numbers(path, "", values, depth=0)


def _check_numbers(path: Path, name: str, value: Any, depth: int) -> None:
    """No number anywhere is infinite, not a number, or beyond 64 bits."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(path, f"{name}.{key}".lstrip("."), inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(path, name, inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _bad_field(path, name, value, "it is a number")
    elif _is_int(value) and abs(value) >= 2**63:
        raise _bad_field(path, name, value, "it has at most 64 bits")


def _bad_field(path: Path, name: str, value: Any, rule: str) -> WeaverError:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    return WeaverError(f"{path}: {name} is {shown}", why=rule, fix=f"fetch {path.name} again")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def check_shapes(folder: Path, expected: Shapes, found: Shapes) -> None:
    """Check the shapes that a configuration asks for against those of the tensors.

    Args:
        folder: of the model.
        expected: shape of every tensor that the model needs, by name.
        found: shape of every tensor of the files.

    Raises:
        WeaverError: one is missing or has another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise WeaverError(
                f"{folder}: holds no tensor {name!r}",
                why="the model that config.json describes has it",
                fix="fetch the whole checkpoint again, config.json included",
            )
        if list(found[name]) != list(shape):
            raise WeaverError(
                f"{folder}: tensor {name!r} has shape {list(found[name])}, config.json says "
                f"{list(shape)}",
                why="sizes of the configuration and of the weights have to agree",
                fix="fetch config.json and the weights of the same model",
            )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        WeaverError: the folder holds none that transformers can load.
    """
    what = f"{folder}: no tokenizer"
    fix = "copy tokenizer.json and tokenizer_config.json into the model's folder"
    # Without any of them transformers makes up a tokenizer that knows no word.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        why = f"the folder holds none of {', '.join(TOKENIZER_FILES)}"
        raise WeaverError(what, why=why, fix=fix)
    for name in _TOKENIZER_JSON:
        if (folder / name).is_file():
            try:
                read_json(inside(folder, name), rebuild=fix)
            except WeaverError as error:
                raise WeaverError(what, why=f"{error.what}: {error.why}", fix=error.fix) from error
    with library_errors(what, fix):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
        ids = tokenizer("A word, and another.", add_special_tokens=False)["input_ids"]
        if not all(_is_int(each) for each in ids):
            raise ValueError("a text does not become token ids")
        return tokenizer


def check_windows(config: PreTrainedConfig, input_ids_WT: torch.Tensor, *, what: str) -> None:
    """Check that a model has an embedding for every token and a position for every place.

    Args:
        config: of the model.
        input_ids_WT: windows of token ids, (W, T).
        what: names the model.

    Raises:
        WeaverError: it lacks one.
    """
    largest, length = int(input_ids_WT.max()), input_ids_WT.shape[1]
    if largest >= config.vocab_size:
        raise WeaverError(
            f"{what}: the tokenizer gives token {largest}",
            why=f"the model has embeddings for {config.vocab_size} tokens",
            fix="put the tokenizer of this very model into its folder",
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise WeaverError(
            f"{what}: windows of {length} tokens",
            why=f"the model has {positions} positions (max_position_embeddings)",
            fix=f"--sequence-length {positions}",
        )
