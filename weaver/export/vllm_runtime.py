"""Log-probabilities and greedy tokens that vLLM computes with a model folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weaver.errors import WeaverError, require_extra
from weaver.export import vllm_probe


@dataclass(frozen=True)
class VllmAnswers:
    """Answers of vLLM.

    Args:
        version: of vLLM.
        logprobs: for every window and every token behind its first one, natural logarithms of the
            likeliest tokens' probabilities.
        texts: what each prompt was continued with.
    """

    version: str
    logprobs: list[list[dict[int, float]]]
    texts: list[list[int]]


def require_vllm(what: str) -> None:
    """Check that vLLM is installed beside weaver.

    Raises:
        WeaverError: it is not.
    """
    require_extra("vllm", "vllm", what)


def run_in_vllm(
    model: Path,
    windows: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    top: int,
    plugin: bool,
    engine: dict[str, Any],
) -> VllmAnswers:
    """Load a model folder in vLLM, in a process of its own.

    Args:
        model: the folder.
        windows: token ids along which log-probabilities are wanted.
        prompts: token ids that are continued greedily, past an end of text.
        new_tokens: by how many tokens.
        top: how many of the likeliest tokens to list.
        plugin: let vLLM load weaver's plug-in; else none at all.
        engine: arguments of ``vllm.LLM`` such as ``dtype``.

    Raises:
        WeaverError: vLLM is missing, or cannot run the model.
    """
    require_vllm(f"a run of {model} in vLLM")
    with tempfile.TemporaryDirectory(prefix="weaver-vllm-") as name:
        questions, answers = Path(name) / "questions.json", Path(name) / "answers.json"
        asked = {
            "windows": [list(ids) for ids in windows],
            "prompts": [list(ids) for ids in prompts],
            "new_tokens": new_tokens,
            "top": top,
            "engine": {"model": str(model.resolve()), **engine},
        }
        questions.write_text(json.dumps(asked))
        # Of the plug-ins that are installed, the one that is asked for.
        environment = os.environ | {"VLLM_PLUGINS": "weaver" if plugin else ""}
        command = [sys.executable, "-I", vllm_probe.__file__, str(questions), str(answers)]
        ran = subprocess.run(
            command, env=environment, cwd=name, text=True, capture_output=True, check=False
        )
        if not answers.exists():
            raise WeaverError(
                f"{model}: vLLM cannot run it", why=_reason(ran.stdout + ran.stderr), fix=_FIX
            )
        found = json.loads(answers.read_text())
    logprobs = [
        [{int(token): value for token, value in place.items()} for place in window]
        for window in found["logprobs"]
    ]
    return VllmAnswers(found["version"], logprobs, found["texts"])


_FIX = "see docs/serving.md for what vLLM runs; vllm serve shows the whole log"


def _reason(words: str) -> str:
    """The first error in a log, with the line behind it: later ones say that a process ended."""
    lines = [line.split("] ")[-1].strip() for line in words.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "Error: " in line:
            return f"{line} {following}".strip()
    return "its process ended"
