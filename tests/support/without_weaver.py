"""A program that tests start: loads model folders where weaver cannot be imported.

Its argument is a JSON file with "models" (name: {"folder", "results", "save"}), a model folder that
is "refused" without trust, token "ids" and the number of "threads".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM


def run(job: dict[str, Any], ids_WT: torch.Tensor) -> dict[str, Any]:
    """Write what a model computes as a safetensors file, and return what it is."""
    options: dict[str, Any] = {"trust_remote_code": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"], output_loading_info=True, **options
    )
    model, info = loaded
    backbone: Any = AutoModel.from_pretrained(job["folder"], **options)
    lengths = {"max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        found = {
            "logits": model(ids_WT).logits,
            "hidden": backbone(ids_WT).last_hidden_state,
            "model_hidden": model.base_model(ids_WT).last_hidden_state,
            "generated": model.generate(ids_WT, do_sample=False, **lengths),
        }
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["results"])
    if job["save"]:
        model.save_pretrained(job["save"])
    return {
        "classes": [type(each).__name__ for each in (model.config, backbone, model)],
        "modules": [type(each).__module__ for each in (model.config, backbone, model)],
        "problems": [sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys")],
    }


def main(path: Path) -> None:
    """Do what the JSON file says, and print what the models are."""
    # Refused, however it is installed.
    sys.modules["weaver"] = None  # type: ignore[assignment]
    job = json.loads(path.read_text())
    torch.set_num_threads(job["threads"])
    ids_WT = torch.tensor(job["ids"])
    found: dict[str, Any] = {name: run(each, ids_WT) for name, each in job["models"].items()}
    try:
        AutoModelForCausalLM.from_pretrained(job["refused"], trust_remote_code=False)
    except ValueError as error:
        found["refused"] = str(error)
    found["imported"] = [name for name, module in sys.modules.items() if module and _is_ours(name)]
    print(json.dumps(found))


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == "weaver"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
