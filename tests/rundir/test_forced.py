"""``--force`` destroys last, and only what weaver made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import file_times, run_config, run_stages, stage_digests

from weaver.artifacts.manifest import MANIFEST, REQUEST
from weaver.artifacts.store import write_json
from weaver.config.finetuning import FinetuneConfig
from weaver.config.sections import EvalConfig, RouterConfig
from weaver.errors import WeaverError
from weaver.rundir import stage_run
from weaver.rundir.stage_run import StageContext, StageRun, settle
from weaver.stages.build_router import build_routers
from weaver.stages.evaluate import evaluate
from weaver.stages.export import export, plan_export
from weaver.stages.finetune import finetune
from weaver.stages.pipeline import run_pipeline

RANDOM = RouterConfig(kind="random")


def _build(run_dir: Path, *, force: bool = True) -> None:
    context = StageContext(run_dir, force=force)
    calls = {"build-router": lambda c: build_routers(c, RANDOM)}
    run_pipeline(context, calls, lambda *_: None)


class Killed(BaseException):
    """Stands for a signal that ends the process at this point."""


def _kill(*_arguments: object, **_more: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (stage_run, "write_json"),
        (stage_run, "write_manifest"),
        (stage_run, "settle"),
        (Path, "rename"),
        (stage_run, "sync_folder"),
        (stage_run, "_clear"),
    ],
)
def test_killed_anywhere_a_forced_stage_leaves_one_of_the_two_results(
    owner: object, name: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stage_digests(run_dir)
    _build(run_dir)
    forced = stage_digests(run_dir)["router"]
    shutil.rmtree(run_dir / "router")
    run_stages_until_router(run_dir)
    assert stage_digests(run_dir) == before

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _kill)
        with pytest.raises(Killed):
            build_routers(StageContext(run_dir, force=True), RANDOM)
    settle(run_dir / "router")
    assert stage_digests(run_dir)["router"] in (before["router"], forced)

    _build(run_dir)
    assert stage_digests(run_dir) == before | {"router": forced}
    assert not list(run_dir.glob(".router*"))


def run_stages_until_router(run_dir: Path) -> None:
    build_routers(StageContext(run_dir), RouterConfig())


def test_killed_between_the_two_renames(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = []
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if self.name == ".router.new":
            raise Killed
        renamed.append(self.name)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", second_fails)
        with pytest.raises(Killed):
            build_routers(StageContext(run_dir, force=True), RANDOM)
    assert "router" in renamed
    assert not (run_dir / "router").exists()

    # The next command, whatever it is, finds the new result in its place.
    run_pipeline(StageContext(run_dir), {}, lambda *_: None)
    assert json.loads((run_dir / "router" / REQUEST).read_text())["config"]["kind"] == "random"
    assert not list(run_dir.glob(".router*"))


def test_what_fails_leaves_the_finished_result(
    run_dir: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tracker and a harness that are not installed, asked for together with --force."""
    sections = {"finetune": {"steps": 1, "batch_size": 1, "sequence_length": 32}}
    run_stages(run_config(tiny_llama, **sections), run_dir, until="eval")
    before = {k: v for k, v in file_times(run_dir).items() if not Path(k).name.startswith(".")}
    context = StageContext(run_dir, force=True)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)

    with pytest.raises(WeaverError, match="the tracker wandb is not installed"):
        finetune(context, FinetuneConfig(**sections["finetune"]), report_to="wandb")
    with pytest.raises(WeaverError, match="lm-evaluation-harness cannot be imported"):
        evaluate(context, EvalConfig(sequence_length=64, tasks=("harness:piqa",)))

    after = {k: v for k, v in file_times(run_dir).items() if not Path(k).name.startswith(".")}
    assert after == before
    assert not list(run_dir.glob(".finetune*"))
    assert not list(run_dir.glob(".eval*"))


@pytest.mark.parametrize("record", [MANIFEST, REQUEST])
def test_a_folder_of_something_else_is_never_emptied(record: str, run_dir: Path) -> None:
    """Other programs write a manifest.json too, and one may be called stage.json."""
    out = run_dir.parent / "web extension"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    write_json(out / record, {"name": "an extension", "manifest_version": 3})

    for force in (False, True):
        context = StageContext(run_dir, force=force)
        from weaver.config.sections import ExportConfig

        with pytest.raises(WeaverError, match=r"stage\.json") as caught:
            export(context, plan_export(context, ExportConfig(target="weaver"), out))
        assert "--force" not in caught.value.fix
    assert (out / "thesis.tex").read_text() == "years of work"


def test_neither_another_stage_nor_what_a_link_leads_to_is_emptied(run_dir: Path) -> None:
    calibration = run_dir / "calibrate"
    manifest = json.loads((run_dir / "router" / REQUEST).read_text())
    shutil.rmtree(run_dir / "router")
    (run_dir / "router").symlink_to(calibration)
    before = file_times(calibration)

    with pytest.raises(WeaverError, match="is a symbolic link"):
        _build(run_dir)

    elsewhere = run_dir.parent / "elsewhere"
    elsewhere.mkdir()
    write_json(elsewhere / REQUEST, manifest)
    (run_dir / "router").unlink()
    (run_dir / "router").symlink_to(elsewhere)
    with pytest.raises(WeaverError, match="is a symbolic link"):
        _build(run_dir)
    assert (elsewhere / REQUEST).exists()
    assert file_times(calibration) == before


def test_a_forced_stage_that_was_interrupted_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "finish", _kill)
        with pytest.raises(Killed):
            build_routers(StageContext(run_dir, force=True), RANDOM)
    layers = file_times(run_dir / ".router.new")
    assert "layer_003.safetensors" in layers

    _build(run_dir)
    assert layers.items() <= file_times(run_dir / "router").items()
