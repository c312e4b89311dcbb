"""Mutations of the files that weaver reads, by seed, and what each may do: one error, or none."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from tiny_gguf import tiny_llama, write_gguf

from weaver.artifacts.manifest import (
    MANIFEST,
    REQUEST,
    ModelIdentity,
    StageManifest,
    StageRequest,
    outputs_digest,
    read_manifest,
    read_request,
    write_manifest,
)
from weaver.artifacts.store import file_digest, write_json
from weaver.config.loading import load_run_config
from weaver.config.sections import ModelConfig
from weaver.data.sources import read_documents
from weaver.errors import WeaverError
from weaver.evaluation.task_files import read_task
from weaver.models.checkpoint import Checkpoint
from weaver.models.gguf import dequantise
from weaver.rundir.stage_folders import check_contents
from weaver.training.checkpoint import Progress, read_checkpoint, save_checkpoint
from weaver.training.guard import Evaluation, HeldOut, load_best, save_best

SECONDS = 10
MAX_BYTES = 10**9
# Values that have tripped a reader up: of other types, out of range, or huge.
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e400, -0.5, float("nan")),
    *("", "x", "\ud800", "~nobody", "../../x", "x" * 5000, "0x", "2024-13-45", "F32", "\x1b[2J"),
    *([], {}, [[]], [0, -1], [2**62, 4], {"a": 1}, [None] * 3),
)
YAML = "model: m\nseed: 1\npartition: {method: cmoe, sparsity: 0.25}\ncalibrate: {tokens: 512}\n"
ROWS = '{"text": "one two", "group": "a"}\n{"prompt": "x", "completion": "y"}\n'
TASK = '{"query": "a", "choices": ["b", "c"], "gold": 0}\n'


def mutated_json(values: Any, random_: random.Random) -> str:
    """JSON text with one or two values replaced, removed or moved; sometimes nested deeply."""
    values = json.loads(json.dumps(values))
    if random_.random() < 0.05:
        depth = random_.choice((100, 5_000, 100_000))
        return '{"a":' * depth + "1" + "}" * depth
    for _ in range(random_.choice((1, 1, 2))):
        _mutate(values, random_)
    return json.dumps(values)


def _mutate(value: Any, random_: random.Random) -> None:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = random_.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and random_.random() < 0.7:
        _mutate(value[key], random_)
    elif random_.random() < 0.2:
        del value[key]
    else:
        value[key] = random_.choice((*VALUES, value[random_.choice(keys)]))


def mutated_bytes(content: bytes, random_: random.Random) -> bytes:
    """Bytes cut off, flipped, repeated, or with others put between."""
    at, kind = random_.randrange(len(content) + 1), random_.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + random_.randbytes(random_.choice((1, 8, 64))) + content[at:]
    if kind == 2:
        return content[:at] + content[at : at + 200] * 3 + content[at:]
    changed = bytearray(content)
    for _ in range(random_.choice((1, 3, 30))):
        changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    return bytes(changed)


def _file(path: Path, random_: random.Random) -> None:
    content = path.read_bytes()
    if path.suffix == ".json" and random_.random() < 0.8:
        path.write_text(mutated_json(json.loads(content), random_))
    elif path.suffix == ".safetensors" and random_.random() < 0.8:
        (length,) = struct.unpack("<Q", content[:8])
        header = mutated_json(json.loads(content[8 : 8 + length]), random_).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    else:
        path.write_bytes(mutated_bytes(content, random_))


def _model(name: str) -> Callable[[Path, Path, random.Random], None]:
    """Open a model with one file changed, and tokenise with it."""

    def attack(model: Path, folder: Path, random_: random.Random) -> None:
        copy = Path(shutil.copytree(model, folder / "model"))
        _file(copy / name, random_)
        checkpoint = Checkpoint(ModelConfig(path=str(copy)))
        checkpoint.tokenizer()
        for tensor in checkpoint.names():
            checkpoint.tensor(tensor)

    return attack


def _records(_model: Path, folder: Path, random_: random.Random) -> None:
    """Read the records of a finished stage, one of them changed, and check what it wrote."""
    stage = folder / "eval"
    stage.mkdir()
    (stage / "results.json").write_text("{}")
    outputs = {"results.json": file_digest(stage / "results.json")}
    request = StageRequest(stage="eval", seed=0, config={"tasks": []}, inputs={})
    identity: dict[str, Any] = {"path": "m", "folder": "m", "revision": None, "files": {}}
    identity |= {"trust_remote_code": False, "model_type": "llama"}
    manifest = StageManifest(
        request=request,
        model=ModelIdentity(**identity, digest="", tokenizer_digest=""),
        outputs=outputs,
        digest=outputs_digest(outputs),
        summary={},
        dtype="float32",
        seconds=1.0,
        peak_memory_bytes=1,
        versions={},
        git_commit=None,
        finished_at="",
    )
    write_json(stage / REQUEST, request.model_dump(mode="json"))
    write_manifest(stage, manifest)
    _file(stage / random_.choice((REQUEST, MANIFEST)), random_)
    read_request(stage / REQUEST, "weaver eval")
    check_contents(stage, read_manifest(stage, rebuild="weaver eval"))


def _text(name: str, text: str, read: Callable[[Path], object]) -> Callable[..., None]:
    def attack(_model: Path, folder: Path, random_: random.Random) -> None:
        content = text
        if random_.random() < 0.5:
            rows = text.splitlines() if text.startswith("{") else []
            value = str(random_.choice(VALUES))
            content = text.replace(random_.choice(text.split()), value[:5000])
            content = mutated_json(json.loads(rows[0]), random_) if rows else content
        raw = content.encode(errors="surrogatepass")
        (folder / name).write_bytes(mutated_bytes(raw, random_) if random_.random() < 0.5 else raw)
        read(folder / name)

    return attack


def _gguf(_model: Path, folder: Path, random_: random.Random) -> None:
    """Dequantise a GGUF file, most often with a change in its header."""
    content = _gguf_bytes()
    header = 12_000
    changed = mutated_bytes(content[:header], random_) + content[header:]
    changed = changed if random_.random() < 0.8 else mutated_bytes(content, random_)
    (folder / "m.gguf").write_bytes(changed)
    dequantise(folder / "m.gguf", folder / "out", torch.float32)


@cache
def _gguf_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        return write_gguf(path, tiny_llama(tied=True), byte_tokenizer()).read_bytes()


def _checkpoint(_model: Path, folder: Path, random_: random.Random) -> None:
    """Go on from a training checkpoint, one of its best weights included."""
    state = {"parameter/a": torch.ones(4), "optimizer/exp_avg/a": torch.ones(4)}
    evaluation = Evaluation(0, 0, HeldOut(2.0, 0.1, 1.9))
    save_checkpoint(folder, state, Progress((1.0,), evaluations=(evaluation,)), {"seed": 0})
    save_best(folder, 0, {"a": torch.ones(4)})
    _file(random_.choice(sorted(folder.iterdir())), random_)
    read_checkpoint(folder, {"seed": 0})
    load_best(folder, 0)


KINDS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "config.json": _model("config.json"),
    "weights": _model("model.safetensors"),
    "tokenizer.json": _model("tokenizer.json"),
    "tokenizer_config.json": _model("tokenizer_config.json"),
    "GGUF": _gguf,
    "training checkpoint": _checkpoint,
    "manifest and request": _records,
    "run file (YAML)": _text("run.yaml", YAML, load_run_config),
    "rows of text": _text("rows.jsonl", ROWS, lambda path: read_documents(str(path), None)),
    "task file": _text("task.jsonl", TASK, read_task),
}


class Slow(BaseException):
    """An input took longer than ``SECONDS``."""


def _alarm(_number: int, _frame: FrameType | None) -> None:
    raise Slow


def attack(kind: str, seed: int, model: Path, folder: Path) -> str:
    """Read one malformed input.

    Args:
        kind: a key of ``KINDS``.
        seed: of the mutation.
        model: folder of the whole model.
        folder: an empty one to work in.

    Returns:
        "refused", "accepted", or what went wrong: the name of an exception, "slow", "memory".
    """
    before = _peak()
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        KINDS[kind](model, folder, random.Random(f"{kind}:{seed}"))
        found = "accepted"
    except WeaverError:
        found = "refused"
    except Slow:
        found = "slow"
    except Exception as error:
        found = type(error).__name__
    finally:
        signal.alarm(0)
    return "memory" if _peak() - before > MAX_BYTES else found


def _peak() -> int:
    """Most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
