"""Costs of errors at each token: measured by calibrate, carried by every profile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import random_ids, save_tiny_model
from tiny_runs import run_config, run_stages

from weaver.algorithms.sensitivity import fit_sensitivity
from weaver.algorithms.statistics import error_weights
from weaver.artifacts.store import read_record
from weaver.artifacts.types import FIRST_TOKENS, LayerProfile
from weaver.config.sections import ModelConfig
from weaver.conversion.sensitivities import measure_sensitivities, spread_windows
from weaver.models.backward import fisher_gradients
from weaver.models.checkpoint import Checkpoint
from weaver.models.stream import DecoderStream
from weaver.rundir.inputs import SENSITIVITY_FILE, read_sensitivities
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext

LENGTH = 32


def profile(folder: Path, layer: int = 1) -> LayerProfile:
    return read_record(layer_path(folder, layer), LayerProfile)


def run(
    model: Path, run_dir: Path, tokens: int, until: str = "partition", length: int = LENGTH
) -> Path:
    calibrate = {"tokens": 512, "sequence_length": length, "sensitivity_tokens": tokens}
    partition = {"method": "weave", "num_experts": 8, "sequential": True}
    run_stages(run_config(model, calibrate=calibrate, partition=partition), run_dir, until=until)
    return run_dir


def test_windows_are_spread() -> None:
    assert spread_windows(16, 4 * LENGTH, LENGTH).tolist() == [0, 4, 8, 12]
    assert spread_windows(3, 1000 * LENGTH, LENGTH).tolist() == [0, 1, 2]
    assert spread_windows(5, 1, LENGTH).tolist() == [0]


def test_profiles_say_what_errors_cost(tiny_llama: Path, tmp_path: Path) -> None:
    """Those of the dense model's hidden states, and those behind converted layers."""
    folder = run(tiny_llama, tmp_path / "run", 128)
    found = read_sensitivities(folder / "calibrate")
    assert found is not None
    for each in (profile(folder / "calibrate"), profile(folder / "partition" / "profile")):
        costs_N = each.input_sensitivities_N
        assert costs_N is not None
        assert bool((costs_N[each.first_tokens_N] == 1).all())
        logs_N = each.ffn_inputs_ND.float() @ found.direction_LD[1] + found.offset_L[1]
        later_N = ~each.first_tokens_N
        torch.testing.assert_close(costs_N.log()[later_N], logs_N[later_N], atol=1e-3, rtol=1e-3)
        assert float(logs_N.std()) > 0.01
        assert int(each.first_tokens_N.sum()) == FIRST_TOKENS * 512 // LENGTH


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_the_regressions_are_those_of_the_gradients(tmp_path: Path, variant: str) -> None:
    """Without first tokens, and behind a norm without what ``error_weights`` knows already."""
    save_tiny_model(variant, tmp_path / "model", byte_tokenizer())
    checkpoint = Checkpoint(ModelConfig(path=str(tmp_path / "model")))
    ids_WT = random_ids(4, LENGTH)
    stream = DecoderStream(checkpoint, torch.float32, ids_WT)
    found = measure_sensitivities(StageContext(tmp_path, seed=3), stream, tmp_path, "title")
    later_T = torch.arange(4 * LENGTH) % LENGTH >= FIRST_TOKENS
    places_T = (torch.arange(4 * LENGTH) % LENGTH)[later_T]
    generator = torch.Generator().manual_seed(3)
    for each in fisher_gradients(stream, tmp_path, generator, lambda _: None):
        x_TD, gradient_TD = each.inputs_TD[later_T], each.gradients_TD[later_T]
        known_T = error_weights(each.outputs_TD[later_T])
        plain_D, _ = fit_sensitivity(x_TD, gradient_TD, places_T)
        normed_D, _ = fit_sensitivity(x_TD, gradient_TD, places_T, known_T)
        assert not torch.allclose(plain_D, normed_D, atol=1e-2)
        expected_D = normed_D if variant == "gemma2" else plain_D
        torch.testing.assert_close(found.direction_LD[each.layer], expected_D)


def test_zero_tokens_weigh_all_alike(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run(tiny_llama, tmp_path / "run", 0)
    assert not (folder / "calibrate" / SENSITIVITY_FILE).exists()
    assert profile(folder / "partition" / "profile").input_sensitivities_N is None


def test_windows_of_first_tokens_only_have_none(tiny_llama: Path, tmp_path: Path) -> None:
    folder = run(tiny_llama, tmp_path / "run", 128, "calibrate", length=FIRST_TOKENS)
    assert not (folder / "calibrate" / SENSITIVITY_FILE).exists()


def test_experts_of_a_mixture_have_none(tmp_path: Path) -> None:
    """Their tokens are what a router sends them, at no place of a window."""
    save_tiny_model("qwen3_moe", tmp_path / "model", byte_tokenizer())
    folder = run(tmp_path / "model", tmp_path / "run", 128, until="calibrate")
    assert not (folder / "calibrate" / SENSITIVITY_FILE).exists()


def test_a_rerun_keeps_what_was_measured(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration that stopped after its backward pass goes on without another one."""
    folder = run(tiny_llama, tmp_path / "run", 128, until="calibrate") / "calibrate"
    before = (folder / SENSITIVITY_FILE).read_bytes()
    for name in ("manifest.json", "layer_001.safetensors"):
        (folder / name).unlink()

    def never(*_arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("weaver.stages.calibrate.measure_sensitivities", never)
    run(tiny_llama, tmp_path / "run", 128, until="calibrate")
    assert (folder / SENSITIVITY_FILE).read_bytes() == before
    assert profile(folder).input_sensitivities_N is not None
