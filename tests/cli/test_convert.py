"""``weaver convert`` as a command."""

from __future__ import annotations

import shlex
from pathlib import Path

from tiny_runs import run_values, write_config
from typer.testing import CliRunner, Result

import weaver.cli.app


def convert(*words: str | Path) -> Result:
    return CliRunner().invoke(weaver.cli.app.app, ["convert", *map(str, words)])


def test_a_model_in_one_command(tiny_llama: Path, tmp_path: Path) -> None:
    words = (tiny_llama, tmp_path / "run", "--tokens", "512", "--method", "cmoe")
    small = ("--set", "calibrate.sequence_length=64", "--set", "assemble.smoke_test=false")
    result = convert(*words, *small)
    assert result.exit_code == 0, result.output
    for stage in ("calibrate", "partition", "build-router", "assemble"):
        assert f"{stage} " in result.output
    assert f"model: {tmp_path / 'run' / 'model'}" in result.output
    assert "sparsity 25.0%" in result.output
    loaded, _ = weaver.load(tmp_path / "run")
    assert loaded.config.weaver["recipe"]["partition"]["method"] == "cmoe"
    # The advice at the end is a command that works.
    advice = result.output.splitlines()[-1].split("weaver ", 1)[1]
    written = CliRunner().invoke(
        weaver.cli.app.app, [*shlex.split(advice), "--max-new-tokens", "4"]
    )
    assert written.exit_code == 0, written.output
    refused = convert(*words, *small, "--sparsity", "0.5")
    assert refused.exit_code == 1
    assert "sparsity" in refused.stderr


def test_flags_go_before_a_file(tiny_llama: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", run_values(tmp_path / "nowhere"))
    result = convert(tiny_llama, tmp_path / "run", "--config", config, "--sparsity", "0.5")
    assert result.exit_code == 0, result.output
    assert "sparsity 50.0%" in result.output
    assert not (tmp_path / "run" / "eval").exists()
