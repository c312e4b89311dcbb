"""``weaver assemble`` as a command: what it says of the smoke test."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import run_config, run_stages, run_values, write_config
from typer.testing import CliRunner

import weaver.cli.app
from weaver.artifacts.manifest import StageManifest, read_manifest
from weaver.artifacts.results import SmokeResult
from weaver.cli.show import show_manifest


@pytest.fixture(scope="module")
def routed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("assemble") / "run"
    run_stages(run_config(tiny_llama), run_dir, until="build-router")
    return run_dir


@pytest.fixture
def run_dir(routed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed, tmp_path / "run"))


def assemble(run_dir: Path, *flags: str | Path) -> str:
    words = ["assemble", "--run-dir", str(run_dir), *map(str, flags)]
    result = CliRunner().invoke(weaver.cli.app.app, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_smoke_test_is_shown_when_made_and_when_skipped(run_dir: Path) -> None:
    output = assemble(run_dir)

    summary = json.loads((run_dir / "model" / "manifest.json").read_text())["summary"]
    tested = SmokeResult.model_validate(summary["smoke_test"])
    line = (
        f"smoke test: KL {tested.kl:.4f} over 282 tokens, repetition "
        f"{100 * tested.repetition:.1f}% (dense {100 * tested.dense_repetition:.1f}%)"
    )
    assert line in output
    assert line in assemble(run_dir)


def test_it_can_be_switched_off(run_dir: Path, tiny_llama: Path, tmp_path: Path) -> None:
    values = run_values(tiny_llama, assemble={"smoke_test": False})
    config = write_config(tmp_path / "run.yaml", values)
    assert "smoke test" not in assemble(run_dir, "--no-smoke-test")
    assert "smoke test" not in assemble(run_dir, "--config", config, "--force")
    # The flag overrides the file.
    assert "smoke test: KL" in assemble(run_dir, "--config", config, "--force", "--smoke-test")


SOUND = SmokeResult(
    tokens=282,
    kl=0.3112,
    not_finite=0,
    dense_not_finite=0,
    repetition=0.12,
    dense_repetition=0.1,
    degenerate=(),
)


@pytest.fixture
def manifest(run_dir: Path) -> StageManifest:
    assemble(run_dir, "--no-smoke-test")
    return read_manifest(run_dir / "model", rebuild="")


def shown(manifest: StageManifest, *, colour: bool = False, **summary: Any) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, soft_wrap=True, highlight=False, force_terminal=colour)
    changed = manifest.model_copy(update={"summary": {**manifest.summary, **summary}})
    show_manifest(console, "assemble", changed, Path("run/model"))
    return file.getvalue().splitlines()[2:]


def test_the_lines_that_are_shown(manifest: StageManifest) -> None:
    sound = SOUND.model_dump(mode="json")
    line = "  smoke test: KL 0.3112 over 282 tokens, repetition 12.0% (dense 10.0%)"
    assert shown(manifest, smoke_test=sound) == [line]
    assert shown(manifest, smoke_test=None) == []
    skipped = {"skipped": "it needs 80 GiB, more memory than was available"}
    assert shown(manifest, smoke_test=skipped) == [f"  smoke test skipped: {skipped['skipped']}"]

    repeating = sound | {"repetition": 0.9, "degenerate": ["one thing", "another"]}
    _, warning, fix = shown(manifest, smoke_test=repeating)
    assert warning == "  warning: degenerate: one thing; another"
    assert fix.startswith("    fix: convert again with a lower --sparsity, more calibration")
    coloured = shown(manifest, colour=True, smoke_test=repeating)
    assert coloured[1] == "  \x1b[33mwarning: degenerate: one thing; another\x1b[0m"

    broken = sound | {"kl": None, "not_finite": 3, "degenerate": ["not finite"]}
    said, _, fix = shown(manifest, smoke_test=broken)
    assert said.startswith("  smoke test: KL not finite over 282 tokens")
    assert fix.startswith("    fix: weaver assemble with --dtype float32 and --force")
