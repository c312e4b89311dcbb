"""``generate``: text from a dense or a converted model, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from weaver.artifacts.dtypes import DTYPES
from weaver.artifacts.manifest import MANIFEST, REQUEST
from weaver.artifacts.store import read_json
from weaver.config.sections import DtypeName, ModelConfig
from weaver.errors import WeaverError
from weaver.evaluation.generation import (
    NGRAM,
    CallbackStreamer,
    Decoding,
    generate_ids,
    repetition,
)
from weaver.evaluation.smoke import REPETITION_BOUND
from weaver.models.device import resolve_device
from weaver.models.intake import load_tokenizer
from weaver.models.loading import load_model
from weaver.models.locate import local_path, locate, weight_files
from weaver.rundir.converted_model import converted_folder
from weaver.rundir.stage_folders import STAGE_FOLDERS

# In a shorter text a single sentence that comes again is half of it.
_ENOUGH_TOKENS = 24
# A folder that holds one of them was written by a stage.
_RECORDS = (REQUEST, MANIFEST)


@dataclass(frozen=True)
class Generated:
    """Length, time and repetition of a generated text.

    Args:
        tokens: new tokens, an end-of-text token included.
        seconds: from the prompt's first token to the last new one, without loading.
        repetition: share of the text's 4-grams that occurred in it before.
    """

    tokens: int
    seconds: float
    repetition: float

    @property
    def problem(self) -> str | None:
        """Warning if ``repetition`` of a long text is above ``REPETITION_BOUND``, else None."""
        if self.tokens < _ENOUGH_TOKENS or self.repetition <= REPETITION_BOUND:
            return None
        return f"{self.repetition:.0%} of the {NGRAM}-grams repeat earlier ones"


def generate(
    name: str,
    prompt: str,
    decoding: Decoding,
    *,
    on_text: Callable[[str], None],
    dtype: DtypeName = "auto",
    device: str = "auto",
    chat: bool = False,
) -> Generated:
    """Let a model write on from a prompt, and hand on every piece of text as it is finished.

    Args:
        name: a model folder, a run directory, a .gguf file or a hub name.
        prompt: the text to write on from; with ``chat`` what the user says.
        decoding: how tokens are chosen.
        on_text: gets the pieces of the new text, without prompt and special tokens.
        dtype: of the weights; ``auto`` as they are stored.
        device: name of the one that computes; see ``resolve_device``.
        chat: put the prompt into the tokenizer's chat template.

    Raises:
        WeaverError: there is no such model, or it cannot be loaded; it has no tokenizer or no chat
            template; the prompt is empty or leaves no room; no token can be drawn.
    """
    place = resolve_device(device)
    folder = model_folder(name)
    weight_files(folder)
    tokenizer = load_tokenizer(folder)
    ids_1T = _prompt_ids(tokenizer, prompt, name=name, chat=chat)
    _check_room(folder, ids_1T.shape[1], decoding)
    model = load_model(
        folder,
        "auto" if dtype == "auto" else DTYPES[dtype],
        device=place,
        fix="name a whole causal language model that transformers can load",
    )
    streamer = CallbackStreamer(tokenizer, on_text)
    started = time.perf_counter()
    new_N = generate_ids(model, ids_1T, decoding, streamer=streamer)[0]
    return Generated(len(new_N), time.perf_counter() - started, repetition(new_N.tolist()))


def model_folder(name: str) -> Path:
    """The Hugging Face folder behind a name.

    A run directory stands for its fine-tuned model, or else for its assembled one.

    Raises:
        WeaverError: there is no such model; the run has not come to one yet.
    """
    path = local_path(name)
    if not path.is_dir() or (path / "config.json").exists():
        return locate(ModelConfig(path=name))
    records = (path / stage / record for stage in STAGE_FOLDERS.values() for record in _RECORDS)
    if any(record.is_file() for record in records):
        return converted_folder(path)
    raise WeaverError(
        f"{name}: neither a model nor a run directory",
        why="it holds no config.json, and no folder of a stage",
        fix="name a folder with config.json and *.safetensors, a run directory, a .gguf file or "
        "a hub name",
    )


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, name: str, chat: bool
) -> Tensor:
    if not chat:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        raise WeaverError(
            f"{name}: the tokenizer has no chat template",
            why="--chat puts the prompt into it, as a chat model was trained",
            fix="leave --chat out",
        )
    if not ids:
        raise WeaverError(
            "the prompt has no tokens",
            why="a model writes on from at least one token",
            fix='weaver generate MODEL "Once upon a time"',
        )
    return torch.tensor([ids], device="cpu")


def _check_room(folder: Path, tokens: int, decoding: Decoding) -> None:
    path = folder / "config.json"
    positions = read_json(path, rebuild=f"fetch {path.name} again").get("max_position_embeddings")
    if positions is None or tokens + decoding.max_new_tokens <= positions:
        return
    room = positions - tokens
    raise WeaverError(
        f"{tokens} tokens of prompt and {decoding.max_new_tokens} new ones",
        why=f"the model has {positions} positions",
        fix=f"--max-new-tokens {room}" if room > 0 else "a shorter prompt",
    )
