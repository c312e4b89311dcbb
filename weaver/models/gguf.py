"""GGUF input: write a GGUF file once as an ordinary Hugging Face model folder.

Everything after this module reads safetensors layer by layer, which a GGUF file does not allow, and
transformers refuses to save a model that it loaded from GGUF. So the weights are dequantised into a
fresh model of the same class and saved next to the tokenizer and the generation config.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.manifest import CARD
from weaver.artifacts.store import read_error, read_json, write_error
from weaver.errors import WeaverError, require_extra, shell
from weaver.models.gguf_header import check_header
from weaver.models.intake import check_fields, library_errors

GGUF_MAGIC = b"GGUF"
# What was dequantised, written into the folder so that another file is never mistaken for it.
SOURCE_FILE = "gguf_source.json"


def dequantise(gguf_path: Path, out_dir: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the model of a GGUF file as a folder that ``from_pretrained`` loads.

    The folder appears under its final name only when it is complete; a complete folder of the same
    file and dtype is kept as it is. Each weight is the value of its quantised block, rounded to
    ``dtype``; tied embeddings stay tied.

    Args:
        gguf_path: a .gguf file of an architecture that transformers can load.
        out_dir: the folder to make.
        dtype: floating-point type of the written weights.

    Returns:
        ``out_dir``.

    Raises:
        WeaverError: the file is missing, not GGUF, damaged or of an unknown architecture;
            ``out_dir`` holds something else; or the folder cannot be written.
    """
    _check_magic(gguf_path)
    require_extra("gguf", "gguf", str(gguf_path))
    tensors = _check_header(gguf_path)
    source = _source(gguf_path, dtype)
    if out_dir.exists() and not _is_empty_folder(out_dir):
        _check_existing(out_dir, source)
        return out_dir
    model, tokenizer = _load(gguf_path, dtype, tensors)
    temporary = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _write_card(gguf_path, temporary)
        (temporary / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")
        _move_into_place(temporary, out_dir, source)
    except OSError as error:
        raise write_error(out_dir, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def _write_card(gguf_path: Path, folder: Path) -> None:
    """Keep the licence that the file names, as a card whose front matter says it."""
    from gguf import GGUFReader

    said = GGUFReader(gguf_path).get_field("general.license")
    if said is not None:
        matter = yaml.safe_dump({"license": said.contents()})
        (folder / CARD).write_text(f"---\n{matter}---\nDequantised from {gguf_path.name}.\n")


def is_dequantised(folder: Path) -> bool:
    """Whether a folder was made by ``dequantise``, which means that it is complete."""
    return (folder / SOURCE_FILE).is_file()


def _check_magic(gguf_path: Path) -> None:
    if not gguf_path.is_file():
        raise WeaverError(
            f"{gguf_path}: no such file",
            why="a GGUF model is one .gguf file",
            fix="python scripts/fetch_demo_model.py makes the demo model",
        )
    with gguf_path.open("rb") as handle:
        magic = handle.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise WeaverError(
            f"{gguf_path}: not a GGUF file, it starts with {magic!r}",
            why=f"a GGUF file starts with {GGUF_MAGIC!r}",
            fix="give a .gguf file, a model folder or a hub name",
        )


def _check_header(gguf_path: Path) -> dict[str, int]:
    """Number of values of every tensor of a file whose header is sound."""
    try:
        return check_header(gguf_path)
    except OSError as error:
        raise read_error(gguf_path, error) from error
    except ValueError as error:
        raise WeaverError(
            f"{gguf_path}: damaged header", why=str(error), fix="download the file again"
        ) from error


def _check_size(gguf_path: Path, config: PreTrainedConfig, tensors: Mapping[str, int]) -> None:
    """The fields describe a model of as many layers as the file holds, and not a larger one."""
    check_fields(gguf_path, config.to_dict())
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(blocks) != config.num_hidden_layers:
        raise _unlike(
            gguf_path, f"{config.num_hidden_layers} layers", f"tensors of {len(blocks)} layers"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    needed, held = sum(each.numel() for each in model.parameters()), sum(tensors.values())
    # Room for what a reader makes up itself; tensors that are missing are named when it has read.
    if needed > 2 * held:
        raise _unlike(gguf_path, f"{needed} parameters", f"{held} values")


def _unlike(gguf_path: Path, described: str, held: str) -> WeaverError:
    return WeaverError(
        f"{gguf_path}: its fields describe a model of {described}",
        why=f"the file holds {held}",
        fix="download the file again",
    )


def _source(gguf_path: Path, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "file": gguf_path.name,
        "bytes": gguf_path.stat().st_size,
        "dtype": dtype_name(dtype),
    }


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check_existing(out_dir: Path, source: dict[str, Any]) -> None:
    remedy = f"{shell('rm', '-r', out_dir)}, or choose another folder"
    if not is_dequantised(out_dir):
        raise WeaverError(
            f"{out_dir}: exists, but holds no dequantised model",
            why=f"a complete folder has a {SOURCE_FILE}; weaver deletes nothing it did not make",
            fix=remedy,
        )
    found = read_json(out_dir / SOURCE_FILE, rebuild=remedy)
    if found != source:
        raise WeaverError(
            f"{out_dir}: was made from {found}, not from {source}",
            why="a folder holds the weights of one GGUF file in one dtype",
            fix=remedy,
        )


def _load(
    gguf_path: Path, dtype: torch.dtype, tensors: Mapping[str, int]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    where = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    what = f"{gguf_path}: transformers {transformers.__version__} cannot load it"
    fix = "download the file again if it is damaged, or use the model's safetensors release"
    # Its annotations know nothing of the report.
    loader: Any = AutoModelForCausalLM
    with library_errors(what, fix):
        config = AutoConfig.from_pretrained(**where)
        _check_size(gguf_path, config, tensors)
        loaded, report = loader.from_pretrained(
            **where,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            **_dequantising_arguments(),
        )
        missing = report["missing_keys"]
        if missing:
            raise _unlike(gguf_path, f"{min(missing)} and others", "no such tensors")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    return _plain_copy(loaded, dtype), tokenizer


def _dequantising_arguments() -> dict[str, Any]:
    """Releases that can keep GGUF blocks packed have to be told not to; earlier ones never do."""
    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def _plain_copy(loaded: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model that does not know it came from a quantised file."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        model = type(loaded)(config)
    state = {name: tensor.to(dtype) for name, tensor in loaded.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _move_into_place(temporary: Path, out_dir: Path, source: dict[str, Any]) -> None:
    try:
        temporary.rename(out_dir)
    except OSError:
        # Another process may have finished the same folder first; then its copy is as good.
        if not is_dequantised(out_dir):
            raise
        _check_existing(out_dir, source)
