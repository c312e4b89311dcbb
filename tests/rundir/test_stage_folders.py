"""A stage reads of another what that one wrote; advice names paths as a shell reads them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_runs import run_config, run_stages, stage_digests

from weaver.artifacts.manifest import MANIFEST, REQUEST, outputs_digest
from weaver.artifacts.store import file_digest
from weaver.errors import WeaverError
from weaver.rundir.inspection import inspect_run
from weaver.rundir.stage_folders import check_contents, finished_stage, stage_command

LAYER = "layer_001.safetensors"
Damage = Callable[[Path], None]


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the tensors of a record anew, as a whole file with the same metadata."""
    with path.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    save_file(change(load_file(path)), path, metadata=header["__metadata__"])


def _flip(folder: Path) -> None:
    def flipped(tensors: dict[str, Any]) -> dict[str, Any]:
        value = next(t for t in tensors.values() if t.is_floating_point() and t.numel())
        value.view(-1)[0] += 1
        return tensors

    _rewrite(folder / LAYER, flipped)


def _swap(folder: Path) -> None:
    (folder / LAYER).rename(folder / "kept")
    (folder / "layer_002.safetensors").rename(folder / LAYER)
    (folder / "kept").rename(folder / "layer_002.safetensors")


def _widen(folder: Path) -> None:
    _rewrite(
        folder / LAYER,
        lambda ts: {k: t.double() if t.is_floating_point() else t for k, t in ts.items()},
    )


def _drop(folder: Path) -> None:
    _rewrite(folder / LAYER, lambda ts: {k: ts[k] for k in sorted(ts)[1:]})


def _empty(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("")


def _add(folder: Path) -> None:
    (folder / "compensation").mkdir(exist_ok=True)
    save_file({}, folder / "compensation" / "layer_000.safetensors")


CORRUPTIONS: list[tuple[str, Damage, str]] = [
    *((stage, _flip, LAYER) for stage in ("calibrate", "router", "partition/profile")),
    *((stage, _swap, LAYER) for stage in ("calibrate", "partition", "router")),
    *((stage, _widen, LAYER) for stage in ("calibrate", "router")),
    *((stage, _drop, LAYER) for stage in ("partition", "router")),
    ("model", _empty, "tokenizer.json"),
    ("router", _add, "compensation/layer_000.safetensors"),
]


@pytest.mark.parametrize(
    ("where", "damage", "named"), CORRUPTIONS, ids=lambda v: getattr(v, "__name__", None)
)
def test_what_changed_after_a_stage_is_read_by_none(
    where: str, damage: Damage, named: str, run_dir: Path, finished: Path, tiny_llama: Path
) -> None:
    folder = run_dir / where
    stage_folder = run_dir / where.split("/", maxsplit=1)[0]
    damage(folder)
    path = folder / named

    # Whatever comes behind it, skipped or run anew, does not take it over.
    with pytest.raises(WeaverError, match=r"digest \w+ instead of|not an output") as caught:
        run_stages(run_config(tiny_llama), run_dir, until="eval")
    assert str(path) in caught.value.what
    assert not (run_dir / "eval").exists()
    (state,) = [s for s in inspect_run(run_dir, verify=True) if s.state == "damaged"]
    assert (state.folder, str(path) in state.note) == (stage_folder, True)

    # The advice, for each file that is named in turn, leads back to the same result.
    commands: list[str] = []
    for _ in range(2):
        try:
            run_stages(run_config(tiny_llama), run_dir, until="assemble")
            finished_stage(run_dir / "model", "assemble")
        except WeaverError as error:
            command, *words = shlex.split(error.fix.partition(",")[0])
            commands.append(command)
            for word in words:
                if word.startswith("/"):
                    Path(word).unlink()
    assert set(commands) <= {"rm", "mv"}
    run_stages(run_config(tiny_llama), run_dir, until="assemble")
    assert stage_digests(run_dir) == stage_digests(finished)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_manifest_is_what_its_own_digest_and_the_request_say(run_dir: Path) -> None:
    """A changed layer whose new digest was written into the manifest is seen all the same."""
    folder = run_dir / "calibrate"
    _flip(folder)
    digest = file_digest(folder / LAYER)
    _edit(folder / MANIFEST, lambda m: m["outputs"].update({LAYER: digest}))
    with pytest.raises(WeaverError, match="its digest is not that of the outputs"):
        finished_stage(folder, "calibrate")

    _edit(folder / MANIFEST, lambda m: m.update(digest=outputs_digest(m["outputs"])))
    with pytest.raises(WeaverError, match="made from another calibrate"):
        finished_stage(run_dir / "partition", "partition")

    _edit(run_dir / "router" / REQUEST, lambda r: r.update(seed=5))
    states = {state.stage: state for state in inspect_run(run_dir, verify=True)}
    assert "another request than stage.json holds" in states["build-router"].note


@pytest.mark.parametrize("name", ["../../x", "/etc/hosts", "a/../../b", "", "x\n; touch y #"])
def test_names_of_outputs_stay_in_their_folder(name: str, run_dir: Path) -> None:
    _edit(run_dir / "calibrate" / MANIFEST, lambda m: m["outputs"].update({name: "0"}))

    with pytest.raises(WeaverError, match="not a valid manifest, outputs") as caught:
        finished_stage(run_dir / "calibrate", "calibrate")

    assert name not in caught.value.fix or not name


def test_advice_quotes_every_name(run_dir: Path) -> None:
    """A manifest that lists a file with a name that a shell would run."""
    name = "x; touch y #"
    _edit(run_dir / "calibrate" / MANIFEST, lambda m: m["outputs"].update({name: "0"}))
    manifest, folder = run_dir / "calibrate" / MANIFEST, run_dir / "calibrate"

    with pytest.raises(WeaverError, match="missing") as caught:
        finished_stage(folder, "calibrate")

    removal, rerun = caught.value.fix.split(", then rerun ")
    assert shlex.split(removal) == ["rm", "-f", str(folder / name), str(manifest)]
    assert rerun.startswith(stage_command("calibrate", run_dir))
    assert shlex.split(stage_command("eval", run_dir)) == [
        *("weaver", "eval", "--run-dir", str(run_dir))
    ]


def test_hidden_files_and_cards_are_no_outputs(run_dir: Path) -> None:
    from weaver.artifacts.manifest import read_manifest

    (run_dir / "model" / ".DS_Store").write_text("")
    (run_dir / "model" / "README.md").write_text("Measured.")
    check_contents(run_dir / "model", read_manifest(run_dir / "model", rebuild=""))
