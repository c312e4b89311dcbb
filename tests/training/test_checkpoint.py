"""Checkpoints: complete or absent, and refused when they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from weaver.artifacts.store import read_tensors, write_tensors
from weaver.config.finetuning import FinetuneConfig
from weaver.errors import WeaverError
from weaver.training.checkpoint import remove_checkpoints, windows_digest
from weaver.training.loop import finetune
from weaver.training.sealed import read_sealed, write_sealed
from weaver.training.trainer import StepReport

ModelFactory = Callable[..., LlamaForCausalLM]
CONFIG = FinetuneConfig(
    objective="next-token", steps=5, batch_size=2, warmup_steps=1, checkpoint_every=2
)


class InterruptionError(Exception):
    """Exception that interrupts a training in these tests."""


@pytest.fixture
def checkpoint(make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path) -> Path:
    """The checkpoint of step 4, left by a training that stopped there."""

    def on_step(report: StepReport) -> None:
        if report.step == 4:
            raise InterruptionError

    with pytest.raises(InterruptionError, match=r"^$"):
        train(make_model(), windows_WT, tmp_path, on_step=on_step)
    return tmp_path / "step-00000004.safetensors"


def train(
    model: LlamaForCausalLM,
    windows_WT: Tensor,
    folder: Path,
    config: FinetuneConfig = CONFIG,
    *,
    seed: int = 0,
    on_step: Any = None,
) -> None:
    finetune(model, [windows_WT], config, seed=seed, checkpoint_dir=folder, on_step=on_step)


def test_only_the_newest_stays_and_holds_the_state(checkpoint: Path) -> None:
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    tensors, metadata = read_tensors(checkpoint)
    assert len(tensors["losses"]) == 4
    assert tensors["buffer/model.layers.0.mlp.router.balance_bias"].abs().max() <= 4e-3
    assert float(tensors["optimizer/step/model.norm.weight"]) == 4.0
    assert tensors["optimizer/exp_avg/model.norm.weight"].shape == (16,)
    assert metadata["settings"]["seed"] == 0


def test_truncated_file_names_itself_and_the_fix(
    checkpoint: Path, make_model: ModelFactory, windows_WT: Tensor
) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(WeaverError, match=r"step-00000004\.safetensors: damaged") as error:
        train(make_model(), windows_WT, checkpoint.parent)
    assert f"delete {checkpoint} and rerun the same command" in error.value.fix
    checkpoint.unlink()
    train(make_model(), windows_WT, checkpoint.parent)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer/exp_avg/model.norm.weight": torch.ones(16, dtype=torch.int32)},
        {"optimizer/exp_avg/model.norm.weight": None},
        {"parameter/model.norm.weight": torch.ones(16, dtype=torch.float16)},
        {"losses": torch.ones(2, 2)},
        {},
    ],
)
def test_damage_that_still_fits_the_model_is_found(
    checkpoint: Path,
    make_model: ModelFactory,
    windows_WT: Tensor,
    change: dict[str, Tensor | None],
) -> None:
    tensors, metadata = read_tensors(checkpoint)
    merged = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    # The metadata alone, where no tensor changes.
    seconds = metadata["seconds"] if change else "x"
    write_tensors(checkpoint, merged, {**metadata, "seconds": seconds})
    with pytest.raises(WeaverError, match=r"step-00000004\.safetensors: damaged, digest") as error:
        train(make_model(), windows_WT, checkpoint.parent)
    assert f"delete {checkpoint} and rerun" in error.value.fix


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 1, r"seed 0 -> 1"),
        ("steps", 9, r"steps 5 -> 9"),
        ("learning_rate", 0.5, r"learning_rate 2e-05 -> 0\.5"),
    ],
)
def test_other_settings_are_refused(
    checkpoint: Path,
    make_model: ModelFactory,
    windows_WT: Tensor,
    key: str,
    value: float,
    message: str,
) -> None:
    seed = 1 if key == "seed" else 0
    config = CONFIG if key == "seed" else CONFIG.model_copy(update={key: value})
    with pytest.raises(WeaverError, match=rf"other settings \({message}\)"):
        train(make_model(), windows_WT, checkpoint.parent, config, seed=seed)


def test_other_windows_are_refused(
    checkpoint: Path, make_model: ModelFactory, windows_WT: Tensor
) -> None:
    with pytest.raises(WeaverError, match=r"other settings \(windows "):
        train(make_model(), windows_WT.flip(0), checkpoint.parent)


def test_the_checkpoint_interval_may_change(
    checkpoint: Path, make_model: ModelFactory, windows_WT: Tensor
) -> None:
    config = CONFIG.model_copy(update={"checkpoint_every": 3})
    train(make_model(), windows_WT, checkpoint.parent, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameter/model.norm.weight": None}, "model.norm.weight is missing"),
        ({"parameter/model.norm.weight": torch.ones(3)}, "has another shape"),
        ({"optimizer/exp_avg/model.norm.weight": torch.ones(3)}, "another shape than its"),
        ({"parameter/extra": torch.ones(3)}, "parameter/extra is not in the model"),
        ({"optimizer/exp_avg/extra": torch.ones(3)}, "belongs to no trained parameter"),
        ({"losses": None}, "losses is missing"),
    ],
)
def test_another_model_is_refused(
    checkpoint: Path,
    make_model: ModelFactory,
    windows_WT: Tensor,
    change: dict[str, Tensor | None],
    message: str,
) -> None:
    tensors, metadata = read_sealed(checkpoint, rebuild="")
    merged = {**tensors, **change}
    write_sealed(checkpoint, {k: v.clone() for k, v in merged.items() if v is not None}, metadata)
    model, before = make_model(), make_model().state_dict()
    with pytest.raises(WeaverError, match="does not fit the model") as error:
        train(model, windows_WT, checkpoint.parent)
    assert message in error.value.why
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_failed_write_keeps_the_older_checkpoint(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file = safetensors.torch.save_file

    def fail_at_step_4(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "step-00000004" in path.name:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("weaver.artifacts.store.save_file", fail_at_step_4)
    with pytest.raises(WeaverError, match="cannot be written") as error:
        train(make_model(), windows_WT, tmp_path)
    assert error.value.why == "No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.safetensors"]


def test_remove_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.txt"
    other.write_text("stays")
    remove_checkpoints(tmp_path)
    assert not checkpoint.exists()
    assert other.exists()
    other.unlink()
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()
    remove_checkpoints(tmp_path)


def test_windows_digest_depends_on_shape_and_values_not_on_dtype() -> None:
    ids_WT = torch.arange(6).reshape(2, 3)
    assert windows_digest(ids_WT) == windows_digest(ids_WT.int())
    assert windows_digest(ids_WT) != windows_digest(ids_WT.reshape(3, 2))
    assert windows_digest(ids_WT) != windows_digest(ids_WT + 1)
