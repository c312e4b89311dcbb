"""Weights and activations that are no numbers are named; odd ones that are numbers convert."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import read_results, run_config, run_stages, run_values

from weaver.config.loading import RunConfig, parse_config
from weaver.errors import WeaverError

Change = Callable[[dict[str, torch.Tensor]], None]
FFN = "model.layers.1.mlp."
METHODS: dict[str, dict[str, Any]] = {
    "weave": {"method": "weave", "num_experts": 8},
    "cmoe": {"method": "cmoe"},
    "expertweaver": {"method": "expertweaver"},
    "flap": {"method": "flap", "num_experts": None},
}


def _model(tiny_llama: Path, folder: Path, change: Change) -> Path:
    model = Path(shutil.copytree(tiny_llama, folder / "model"))
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{FFN}down_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_no_number(
    name: str, value: float, tiny_llama: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    model = _model(tiny_llama, tmp_path, change)
    expected = rf"calibrate: .*model.safetensors: 1 of \d+ values of '{name}' are NaN or infinite"
    with pytest.raises(WeaverError, match=expected):
        run_stages(run_config(model), tmp_path / "run", until="calibrate")


def test_an_overflow_of_float16(tiny_llama: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FFN}up_proj.weight"] *= 1e4
        tensors[f"{FFN}down_proj.weight"] *= 1e4

    model = _model(tiny_llama, tmp_path, change)
    values = run_values(model) | {"model": {"path": str(model), "dtype": "float16"}}
    config = parse_config(RunConfig, values, source="test")
    with pytest.raises(WeaverError, match=r"calibrate: .*NaN or infinite") as caught:
        run_stages(config, tmp_path / "run", until="partition")
    assert caught.value.why == "float16 ends at 65504"
    assert "--dtype bfloat16" in caught.value.fix


def _dead(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FFN}up_proj.weight"][:59] = 0


def _duplicated(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("gate", "up"):
        tensors[f"{FFN}{part}_proj.weight"][:] = tensors[f"{FFN}{part}_proj.weight"][0]


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if name.startswith(FFN):
            value.zero_()


def _tiny(tensors: dict[str, torch.Tensor]) -> None:
    for name, value in tensors.items():
        if name.startswith(FFN):
            value.fill_(1e-20)


def _constant(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][:] = tensors["model.embed_tokens.weight"][0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [_dead, _duplicated, _zero, _tiny, _constant])
def test_odd_weights_convert(change: Change, method: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = _model(tiny_llama, tmp_path, change)
    config = run_config(model, partition=METHODS[method], eval={"windows": 1})
    run_stages(config, tmp_path / "run", until="eval")
    kl = read_results(tmp_path / "run")["kl"]
    assert 0 <= kl < 20


@pytest.mark.parametrize("method", METHODS)
def test_documents_of_one_token(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text('{"text": "a"}\n{"text": "b"}\n' * 600)
    data = {"data": [str(text)]}
    config = run_config(
        tiny_llama, calibrate=data, partition=METHODS[method], eval={**data, "windows": 1}
    )
    run_stages(config, tmp_path / "run", until="eval")
