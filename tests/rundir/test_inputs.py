"""A run directory from somebody else is data: it decides nothing about what may run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import weaver.cli.app
from weaver.artifacts.manifest import MANIFEST

# Code in a model's folder, and the entry that names it.
CODE = """
open({trace!r}, "w").close()
from transformers import LlamaConfig
class Config(LlamaConfig): pass
"""


@pytest.fixture
def trace(tiny_llama: Path, run_dir: Path, tmp_path: Path) -> Path:
    """A run whose manifests say that the model's own code may run; a file that the code writes."""
    import shutil

    trace = tmp_path / "trace"
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (model / "own.py").write_text(CODE.format(trace=str(trace)))
    config = model / "config.json"
    values = json.loads(config.read_text()) | {"auto_map": {"AutoConfig": "own.Config"}}
    config.write_text(json.dumps(values))
    for stage in ("calibrate", "partition", "router", "model"):
        path = run_dir / stage / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["model"] |= {"trust_remote_code": True, "folder": str(model)}
        path.write_text(json.dumps(manifest))
    return trace


@pytest.mark.parametrize(
    "command", ["partition", "build-router", "assemble", "finetune", "eval", "bench", "export"]
)
def test_no_command_runs_code_because_a_manifest_says_so(
    command: str, run_dir: Path, trace: Path
) -> None:
    where = [str(run_dir)] if command == "export" else ["-r", str(run_dir)]
    done = CliRunner().invoke(weaver.cli.app.app, [command, *where])
    assert done.exit_code == 1, done.output
    assert "fix: --trust-remote-code" in done.stderr
    assert not trace.exists()
    CliRunner().invoke(weaver.cli.app.app, [command, *where, "--trust-remote-code"])
    assert trace.exists()
