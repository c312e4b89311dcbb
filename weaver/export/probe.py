"""A process that knows an export, and nothing of weaver: ``weaver verify`` runs this file.

It loads the model as anyone would, with transformers alone; importing weaver is made to fail. Then
it answers line by line: ``window I`` writes logits and selected experts of a window,
``generate N`` the greedy continuation of every prompt, both as files in the working folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

INPUTS, EXPERTS = "inputs.safetensors", "experts.{}"


class SelectedExperts(AbstractContextManager[list[Tensor]]):
    """Collects the expert ids, (T, K), that every router of a model selects in one forward.

    A stock router is a module that returns a tuple with the ids as its last integer tensor.
    """

    def __init__(self, model: nn.Module, module: str) -> None:
        self._ids: list[Tensor] = []
        self._hooks = [
            found.register_forward_hook(self._note)
            for name, found in model.named_modules()
            if module and name.endswith(f".{module}")
        ]

    def __enter__(self) -> list[Tensor]:
        return self._ids

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, _module: nn.Module, _arguments: Any, outputs: tuple[Tensor, ...]) -> None:
        ids = [tensor for tensor in outputs if tensor.dtype == torch.int64]
        self._ids.append(ids[-1].reshape(-1, ids[-1].shape[-1]))


def load(folder: str, dtype: str, *, remote_code: bool) -> Any:
    """The model, all of whose keys must fit."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        trust_remote_code=remote_code,
    )
    model, info = loaded
    problems = {
        kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys") if info[kind]
    }
    if problems:
        raise SystemExit(f"keys do not fit: {problems}")
    return model.eval()


@torch.no_grad()
def answer(model: Any, inputs: dict[str, Tensor], folder: Path, router: str, line: str) -> None:
    """Answer one request."""
    what, number = line.split()
    if what == "window":
        ids_T = inputs["windows"][int(number)]
        with SelectedExperts(model, router) as selected:
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        tensors = {EXPERTS.format(i): ids for i, ids in enumerate(selected)}
        save_file(tensors | {"logits": logits_TV.contiguous()}, folder / "window.safetensors")
        return
    texts = [
        model.generate(prompt_T[None], max_new_tokens=int(number), do_sample=False)[0].tolist()
        for prompt_T in inputs["prompts"]
    ]
    (folder / "generated.json").write_text(json.dumps(texts))


def main() -> None:
    """Load the model, then answer until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--router", default="")
    parser.add_argument("--remote-code", action="store_true")
    arguments = parser.parse_args()
    # A name that is None here cannot be imported by anyone.
    sys.modules["weaver"] = None  # type: ignore[assignment]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = load(arguments.model, arguments.dtype, remote_code=arguments.remote_code)
    inputs = load_file(arguments.folder / INPUTS)
    print(f"ready {type(model).__name__}", flush=True)
    for line in sys.stdin:
        answer(model, inputs, arguments.folder, arguments.router, line)
        print("done", flush=True)


if __name__ == "__main__":
    main()
