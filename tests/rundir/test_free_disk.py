"""A stage that has no room on the disk says so before it computes or removes anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import file_times, run_config, run_stages

from weaver.config.finetuning import FinetuneConfig
from weaver.config.sections import (
    AssembleConfig,
    CalibrateConfig,
    ExportConfig,
    ModelConfig,
    PartitionConfig,
    RouterConfig,
)
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.free_disk import free_disk, require_disk
from weaver.rundir.stage_run import StageContext
from weaver.stages.assemble import assemble
from weaver.stages.calibrate import calibrate
from weaver.stages.estimate import estimate
from weaver.stages.export import export, plan_export
from weaver.stages.finetune import finetune
from weaver.stages.partition import partition
from weaver.stages.pipeline import run_pipeline, stage_calls

CALIBRATE = CalibrateConfig(tokens=512, sequence_length=64)
STAGES: dict[str, Callable[[StageContext, ModelConfig], object]] = {
    "calibrate": lambda context, model: calibrate(context, model, CALIBRATE),
    "partition": lambda context, _: partition(
        context, PartitionConfig(method="cmoe", sequential=True, num_experts=8), RouterConfig()
    ),
    "assemble": lambda context, _: assemble(context, AssembleConfig(smoke_test=False)),
    "finetune": lambda context, _: finetune(
        context, FinetuneConfig(steps=1, batch_size=1, sequence_length=32)
    ),
    "export": lambda context, _: export(context, plan_export(context, ExportConfig())),
}


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the bytes that are free on every disk."""

    def set_free(free: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)

    return set_free


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_changed_without_room(
    stage: str, tiny_llama: Path, tmp_path: Path, little: Callable[[int], None]
) -> None:
    model = ModelConfig(path=str(tiny_llama))
    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    before = file_times(tmp_path)
    little(2000)
    with pytest.raises(WeaverError, match=r"1\.95 KiB of disk are free, .* are needed"):
        STAGES[stage](StageContext(tmp_path, force=True), model)
    assert file_times(tmp_path) == before


def test_a_run_asks_for_the_model_before_it_calibrates(
    tiny_llama: Path, tmp_path: Path, little: Callable[[int], None]
) -> None:
    """Room for the calibration alone is room for ``calibrate``, not for ``run``."""
    config = run_config(tiny_llama)
    needs = estimate(config, Checkpoint(config.model))
    little(needs["calibrate"].disk // 2)
    calibrate(StageContext(tmp_path / "alone"), config.model, config.calibrate)
    with pytest.raises(WeaverError, match="of disk are free"):
        run_pipeline(StageContext(tmp_path / "run"), stage_calls(config), lambda *_: None)
    assert not (tmp_path / "run" / "calibrate").exists()


def test_what_is_written_already_is_not_asked_for_again(
    tmp_path: Path, little: Callable[[int], None]
) -> None:
    little(1000)
    assert free_disk(tmp_path / "not" / "there") == 1000
    with pytest.raises(WeaverError, match=r"1000 B of disk are free, 1\.46 KiB are needed"):
        require_disk(tmp_path, 1500)
    (tmp_path / "layer").write_bytes(bytes(600))
    require_disk(tmp_path, 1500)
