"""Skip, resume, run or refuse: what is decided from what is on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import file_times, fork_weaver, run_config, run_stages, run_weaver, stage_digests

from weaver.artifacts.manifest import MANIFEST, REQUEST, SCHEMA_VERSION
from weaver.config.sections import RouterConfig
from weaver.errors import WeaverError, shell
from weaver.rundir.inspection import inspect_run
from weaver.rundir.lock import locked
from weaver.rundir.stage_folders import stage_command
from weaver.rundir.stage_run import StageContext
from weaver.stages.build_router import build_routers
from weaver.stages.pipeline import plan_pipeline, stage_calls

FINETUNE = {"steps": 2, "batch_size": 1, "sequence_length": 32}


def _rerun(run_dir: Path, model: Path, *, force: bool = False, **sections: Any) -> None:
    run_stages(run_config(model, **sections), run_dir, until="assemble", force=force)


def test_another_configuration_is_refused_with_old_and_new_values(
    run_dir: Path, tiny_llama: Path
) -> None:
    before = file_times(run_dir)

    with pytest.raises(WeaverError, match="made with another configuration") as caught:
        _rerun(run_dir, tiny_llama, partition={"sparsity": 0.5, "sequential": False})

    assert "sparsity: 0.25 on disk, 0.5 asked for" in caught.value.what
    assert "sequential: True on disk, False asked for" in caught.value.what
    assert "num_experts" not in caught.value.what
    assert "--force" in caught.value.fix
    assert file_times(run_dir) == before


def test_another_seed_is_another_configuration(run_dir: Path, tiny_llama: Path) -> None:
    with pytest.raises(WeaverError, match=r"calibrate: made with .*seed: 0 on disk, 7 asked for"):
        run_stages(run_config(tiny_llama), run_dir, seed=7)


def test_force_replaces_the_stage_and_all_after_it(run_dir: Path, tiny_llama: Path) -> None:
    before = stage_digests(run_dir)
    (run_dir / "partition" / "profile").touch()

    _rerun(run_dir, tiny_llama, force=True, partition={"sparsity": 0.5, "sequential": False})

    after = stage_digests(run_dir)
    assert after["calibrate"] == before["calibrate"]
    assert all(after[name] != before[name] for name in ("partition", "router", "model"))
    assert not (run_dir / "partition" / "profile").exists()


def test_a_changed_parent_is_refused_by_name(run_dir: Path, tiny_llama: Path) -> None:
    config = run_config(tiny_llama, partition={"sparsity": 0.5})
    partition = stage_calls(config)["partition"]
    partition(StageContext(run_dir, force=True))
    before = file_times(run_dir)

    with pytest.raises(WeaverError, match="router: made from another partition") as caught:
        _rerun(run_dir, tiny_llama, partition={"sparsity": 0.5})

    assert caught.value.why == "partition changed after build-router ran"
    assert shell("rm", "-r", run_dir / "router") in caught.value.fix
    assert file_times(run_dir) == before


def test_a_stage_does_not_read_a_parent_made_from_something_older(
    run_dir: Path, tiny_llama: Path
) -> None:
    config = run_config(tiny_llama, partition={"sparsity": 0.5})
    calls = stage_calls(config)
    calls["partition"](StageContext(run_dir, force=True))

    for stage in ("assemble", "eval"):
        with pytest.raises(WeaverError, match=r"made from another partition than .* holds now"):
            calls[stage](StageContext(run_dir))


def test_an_outdated_fine_tuned_model_is_not_evaluated(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama, finetune=FINETUNE), tmp_path, until="finetune")
    config = run_config(tiny_llama, finetune=FINETUNE, assemble={"dtype": "bfloat16"})
    calls = stage_calls(config)
    calls["assemble"](StageContext(tmp_path, force=True))

    with pytest.raises(WeaverError, match="finetune: made from another assemble than"):
        calls["eval"](StageContext(tmp_path))


@pytest.mark.parametrize("force", [False, True])
def test_foreign_files_are_neither_overwritten_nor_removed(
    force: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("somebody's own weights")

    with pytest.raises(WeaverError, match=r"model: holds files, but no stage\.json"):
        _rerun(tmp_path, tiny_llama, force=force)

    assert (tmp_path / "model" / "model.safetensors").read_text() == "somebody's own weights"


def test_a_file_in_place_of_a_stage_folder_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "partition").write_text("")

    with pytest.raises(WeaverError, match="partition: is a file"):
        _rerun(tmp_path, tiny_llama)


def test_temporary_files_of_a_killed_process_are_no_foreign_files(
    tiny_llama: Path, finished: Path, tmp_path: Path
) -> None:
    """Killed while it wrote stage.json, and while it wrote the first layer."""
    (tmp_path / "calibrate").mkdir()
    (tmp_path / "calibrate" / ".stage.json.123.tmp").write_text("{")
    (tmp_path / "partition" / "profile").mkdir(parents=True)
    (tmp_path / "partition" / "profile" / ".layer_000.safetensors.1.tmp").write_text("x")
    (tmp_path / "partition" / ".tmpAb3dEf").write_text("how safetensors itself names them")
    shutil.copy(finished / "partition" / REQUEST, tmp_path / "partition")

    _rerun(tmp_path, tiny_llama)

    assert stage_digests(tmp_path) == stage_digests(finished)
    assert not list(tmp_path.rglob(".*tmp*"))


def test_what_a_stage_writes_may_be_read_by_those_who_may_read_a_new_file(finished: Path) -> None:
    modes = {path.stat().st_mode for path in finished.rglob("*") if path.is_file()}

    assert len(modes) == 1


def test_a_stage_that_wrote_nothing_yet_does_not_hold_its_configuration(run_dir: Path) -> None:
    """A stage that failed at once (say, a bad option) can be asked again with another one."""
    for path in (run_dir / "router").iterdir():
        if path.name != REQUEST:
            path.unlink()
    shutil.rmtree(run_dir / "model")

    build_routers(StageContext(run_dir), RouterConfig(kind="random"))

    request = json.loads((run_dir / "router" / REQUEST).read_text())
    assert request["config"]["kind"] == "random"


@pytest.mark.parametrize("stage", ["calibrate", "partition", "router"])
def test_missing_layers_are_made_again_and_the_others_left_alone(
    stage: str, run_dir: Path, tiny_llama: Path, finished: Path
) -> None:
    folder = run_dir / stage
    (folder / MANIFEST).unlink()
    for layer in (2, 3):
        (folder / f"layer_{layer:03d}.safetensors").unlink()
    before = file_times(run_dir)

    _rerun(run_dir, tiny_llama)

    after = file_times(run_dir)
    kept = [f"{stage}/layer_{layer:03d}.safetensors" for layer in (0, 1)]
    kept += [name for name in before if not name.startswith(stage)]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert stage_digests(run_dir) == stage_digests(finished)


def test_a_manifest_of_another_schema_is_refused(run_dir: Path, tiny_llama: Path) -> None:
    path = run_dir / "partition" / MANIFEST
    raw = json.loads(path.read_text())
    raw["request"]["schema_version"] = 99
    path.write_text(json.dumps(raw))

    with pytest.raises(WeaverError, match="schema version 99") as caught:
        _rerun(run_dir, tiny_llama)

    assert f"schema version {SCHEMA_VERSION}" in caught.value.why
    assert caught.value.fix.endswith("--force")


@pytest.mark.parametrize("text", ["{", "[]", '{"request": 3}', "{}"])
@pytest.mark.parametrize("name", [MANIFEST, REQUEST])
def test_a_damaged_stage_record_is_an_error_with_a_way_out(
    name: str, text: str, run_dir: Path, tiny_llama: Path
) -> None:
    (run_dir / "router" / MANIFEST).unlink()
    (run_dir / "router" / name).write_text(text)

    with pytest.raises(WeaverError, match=f"router/{name}: (damaged|not a valid|schema)") as caught:
        _rerun(run_dir, tiny_llama)

    # stage.json alone says that weaver made the folder: without it nothing there is removed.
    advice = "--force" if name == MANIFEST else shell("mv", run_dir / "router", "ELSEWHERE")
    assert advice in caught.value.fix


def _damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("how", ["missing", "truncated"])
@pytest.mark.parametrize(
    "name",
    [
        "calibrate/tokens.safetensors",
        "calibrate/layer_001.safetensors",
        "partition/layer_001.safetensors",
        "partition/profile/layer_001.safetensors",
        "partition/router/layer_001.safetensors",
        "router/layer_001.safetensors",
        "model/model.safetensors",
    ],
)
def test_a_damaged_output_is_named_and_the_advice_mends_it(
    name: str, how: str, run_dir: Path, tiny_llama: Path, finished: Path
) -> None:
    path = run_dir / name
    _damage(path, how)

    with pytest.raises(WeaverError, match=f"{name}: (missing|damaged)") as caught:
        _rerun(run_dir, tiny_llama)

    manifest = path.parents[len(Path(name).parts) - 2] / MANIFEST
    assert caught.value.fix.startswith(f"{shell('rm', '-f', path, manifest)}, then rerun weaver ")
    path.unlink(missing_ok=True)
    manifest.unlink()
    _rerun(run_dir, tiny_llama)
    assert stage_digests(run_dir) == stage_digests(finished)


def test_a_damaged_layer_of_an_unfinished_stage_is_named(run_dir: Path, tiny_llama: Path) -> None:
    (run_dir / "router" / MANIFEST).unlink()
    path = run_dir / "router" / "layer_001.safetensors"
    _damage(path, "truncated")

    with pytest.raises(WeaverError, match=r"layer_001\.safetensors: damaged, \d+ bytes") as caught:
        _rerun(run_dir, tiny_llama)

    fix = f"{shell('rm', path)}, then rerun {stage_command('build-router', run_dir)} as before"
    assert caught.value.fix == fix


def test_a_missing_parent_names_the_command_that_makes_it(tiny_llama: Path, tmp_path: Path) -> None:
    calls = stage_calls(run_config(tiny_llama))
    for stage, parent in (
        ("partition", "calibrate"),
        ("build-router", "partition"),
        ("assemble", "partition"),
        ("eval", "assemble"),
        ("bench", "assemble"),
    ):
        with pytest.raises(WeaverError, match=f"no finished {parent} stage") as caught:
            calls[stage](StageContext(tmp_path))
        assert caught.value.fix == stage_command(parent, tmp_path)


def test_an_unknown_router_leaves_nothing_behind(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "router")

    with pytest.raises(WeaverError, match="unknown router 'nonesuch'"):
        build_routers(StageContext(run_dir), RouterConfig(kind="nonesuch"))

    assert not (run_dir / "router").exists()


def test_the_plan_says_what_each_stage_would_do(
    run_dir: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    (run_dir / "router" / MANIFEST).unlink()
    before = file_times(run_dir)

    half = plan_pipeline(StageContext(run_dir), stage_calls(run_config(tiny_llama)))
    other = run_config(tiny_llama, partition={"sparsity": 0.5})
    refused = plan_pipeline(StageContext(run_dir), stage_calls(other))
    forced = plan_pipeline(StageContext(run_dir, force=True), stage_calls(other))
    fresh = plan_pipeline(StageContext(tmp_path / "new"), stage_calls(other))

    assert [stage.status for stage in half] == ["skip", "skip", "resume", "run", "run", "run"]
    assert half[3].note == "after build-router; would be compared with what is there"
    assert [stage.status for stage in refused] == ["skip"] + 5 * ["refuse"]
    assert "sparsity: 0.25 on disk, 0.5 asked for" in refused[1].note
    assert refused[2].note == "partition is refused"
    assert {stage.status for stage in forced} == {"run"}
    assert {stage.status for stage in fresh} == {"run"}
    assert file_times(run_dir) == before
    assert not (tmp_path / "new").exists()


def test_a_second_process_is_turned_away_until_the_first_has_gone(
    run_dir: Path, tiny_llama: Path
) -> None:
    command = ("build-router", "--run-dir", run_dir)
    with locked(run_dir):
        with (
            pytest.raises(WeaverError, match="another weaver process is at work here"),
            locked(run_dir),
        ):
            pass
        second = run_weaver(*command)
    third = fork_weaver(run_dir / "log", *command)
    third.join(60)

    assert second.returncode == 1
    assert "another weaver process is at work here" in second.stderr
    assert "Traceback" not in second.stderr
    assert third.exitcode == 0


def test_a_process_killed_before_it_holds_the_lock_leaves_nothing_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = Path.touch

    def die(path: Path) -> None:
        touch(path)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "touch", die)
        with locked(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", [".lock", ".writable"])
def test_nothing_is_written_through_a_link_in_the_run_directory(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    (run_dir / name).symlink_to(victim)
    if name == ".lock":
        with (
            pytest.raises(WeaverError, match=r"\.lock: is a symbolic link") as error,
            locked(run_dir),
        ):
            pass
        assert error.value.fix == f"rm '{run_dir / name}'"
        (run_dir / name).unlink()
    with locked(run_dir):
        pass
    assert victim.read_text() == "precious"


def test_inspect_tells_complete_unfinished_and_damaged_apart(
    run_dir: Path, tiny_llama: Path
) -> None:
    (run_dir / "router" / MANIFEST).unlink()
    _damage(run_dir / "partition" / "layer_000.safetensors", "truncated")

    states = {state.stage: state for state in inspect_run(run_dir, verify=False)}

    assert {name: state.state for name, state in states.items()} == {
        "calibrate": "complete",
        "partition": "damaged",
        "build-router": "unfinished",
        "assemble": "complete",
    }
    assert "layer_000.safetensors: damaged" in states["partition"].note
    assert states["build-router"].note.startswith("4 layers so far")
    sizes = [path.stat().st_size for path in (run_dir / "model").rglob("*") if path.is_file()]
    assert states["assemble"].size == sum(sizes)


@pytest.mark.parametrize("name", ["calibrate/layer_002.safetensors", "model/config.json"])
def test_only_verify_sees_a_flipped_byte(name: str, run_dir: Path) -> None:
    path = run_dir / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)

    assert {state.state for state in inspect_run(run_dir, verify=False)} == {"complete"}
    damaged = [s for s in inspect_run(run_dir, verify=True) if s.state == "damaged"]
    assert [state.folder.name for state in damaged] == [Path(name).parts[0]]
    assert f"{path}: digest " in damaged[0].note


def test_inspect_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="no run directory"):
        inspect_run(tmp_path / "nothing", verify=False)
