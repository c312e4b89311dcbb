"""An exported model in a process of its own, in which weaver cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weaver.errors import WeaverError
from weaver.export import probe

ERRORS = "stderr"


@dataclass(frozen=True)
class FreshModel:
    """A model that answers from another process.

    Args:
        name: its class.
        folder: where answers are written.
        process: the process.
    """

    name: str
    folder: Path
    process: subprocess.Popen[str]

    def window(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Logits of a window, (T, V), and the selected experts of every layer, (T, K) each."""
        self._ask(f"window {index}")
        tensors = load_file(self.folder / "window.safetensors")
        count = len(tensors) - 1
        return tensors["logits"], [tensors[probe.EXPERTS.format(i)] for i in range(count)]

    def generate(self, tokens: int) -> list[list[int]]:
        """Every prompt with its greedy continuation, as token ids."""
        self._ask(f"generate {tokens}")
        texts: list[list[int]] = json.loads((self.folder / "generated.json").read_text())
        return texts

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answered(self.process, "done", self.folder / ERRORS)


@contextmanager
def fresh_model(
    model: Path,
    windows_WT: Tensor,
    prompts_PT: Tensor,
    *,
    dtype: torch.dtype,
    router: str,
    remote_code: bool,
) -> Iterator[FreshModel]:
    """Load a model folder in a new process that has transformers and not weaver.

    Args:
        model: the folder.
        windows_WT: windows of token ids that can be asked for, (W, T).
        prompts_PT: prompts that can be continued, (P, T).
        dtype: of the computation.
        router: name of the routers inside a decoder layer; empty if they cannot be watched.
        remote_code: let the folder's own code run.

    Raises:
        WeaverError: the process cannot load the model, or ends early.
    """
    with tempfile.TemporaryDirectory(prefix="weaver-verify-") as name:
        folder = Path(name)
        given = {"windows": windows_WT, "prompts": prompts_PT}
        layout = torch.contiguous_format
        own = {k: ids.clone(memory_format=layout) for k, ids in given.items()}
        save_file(own, folder / probe.INPUTS)
        command = [sys.executable, "-I", probe.__file__, str(model.resolve()), str(folder)]
        command += ["--dtype", str(dtype).removeprefix("torch."), "--router", router]
        command += ["--remote-code"] if remote_code else []
        with (folder / ERRORS).open("w") as errors:
            process = subprocess.Popen(
                command,
                text=True,
                cwd=folder,
                env=_environment(folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        try:
            loaded = answered(process, "ready", folder / ERRORS).split()[1]
            yield FreshModel(loaded, folder, process)
        finally:
            process.kill()
            process.communicate()


def _environment(home: Path) -> dict[str, str]:
    """Environment for the process: threads and devices of this one, but no home and no token."""
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "CUDA_VISIBLE_DEVICES")
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    values = {name: os.environ[name] for name in (*kept, *threads) if name in os.environ}
    return values | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}


def answered(process: subprocess.Popen[str], expected: str, errors: Path) -> str:
    """The next line of the process, whose standard error goes to a file.

    Raises:
        WeaverError: it ended instead; with its last words.
    """
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if line.startswith(expected):
        return line
    process.wait()
    words = errors.read_text().strip().splitlines()
    # The name of an error begins its message; advice may follow in more lines.
    words = [word for word in words if "Error: " in word] or words
    raise WeaverError(
        "the exported model does not run without weaver",
        why=words[-1] if words else "its process ended",
        fix="rerun weaver export with --force; if it stays, load the folder with transformers",
    )
