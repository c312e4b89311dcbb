"""``weaver export`` and ``weaver verify`` as programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import run_config, run_stages, run_weaver


@pytest.fixture(scope="module")
def run_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a linear router; exports are made beside its stages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    partition = {"method": "expertweaver", "num_experts": 8}
    run_stages(run_config(tiny_llama, partition=partition), folder, until="assemble")
    return folder


def test_an_export_is_written_and_verified(run_dir: Path, tmp_path: Path) -> None:
    planned = run_weaver("export", run_dir, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "export: would run" in planned.stdout
    assert not (run_dir / "export-glm4-moe").exists()

    made = run_weaver("export", run_dir)
    assert made.returncode == 0, made.stderr
    assert "glm4-moe holds the model exactly" in made.stdout
    folder = run_dir / "export-glm4-moe"
    assert (folder / "config.json").exists()
    assert run_weaver("export", run_dir).returncode == 0

    text = ("--tokens", "64", "--sequence-length", "64", "--new-tokens", "4")
    file = tmp_path / "verified.json"
    checked = run_weaver("verify", folder, "--against", run_dir, *text, "--json", file)
    assert checked.returncode == 0, checked.stderr
    assert "Glm4MoeForCausalLM" in checked.stdout
    assert "top-1 agreement" in checked.stdout
    result = json.loads(file.read_text())
    assert result["kl"] < 1e-6
    assert result["top1_agreement"] == 1

    failed = run_weaver("verify", folder, "--against", run_dir, *text, "--max-kl", "1e-30")
    assert failed.returncode == 1
    assert "above 1e-30" in failed.stderr


def test_thresholds_apply_to_llama_cpp_too(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    made = run_weaver("export", run_dir, "--to", "gguf", "--quantisation", "q8_0", "--out", folder)
    assert made.returncode == 0, made.stderr
    text = ("--tokens", "64", "--sequence-length", "64", "--new-tokens", "2")
    failed = run_weaver("verify", folder, "--against", run_dir, *text, "--max-kl", "1e-12")
    assert failed.returncode == 1
    assert "above 1e-12" in failed.stderr


def test_errors_have_three_lines(run_dir: Path, tmp_path: Path) -> None:
    wrong = run_weaver("export", run_dir, "--to", "onnx")
    assert wrong.returncode == 1
    assert "error: no target is called 'onnx'" in wrong.stderr
    assert "fix: leave --to out" in wrong.stderr
    nothing = run_weaver("export", tmp_path)
    assert nothing.returncode == 1
    assert "no finished assemble stage" in nothing.stderr
    unknown = run_weaver("export", run_dir, "--to", "gguf", "--quantisation", "q2_k")
    assert unknown.returncode == 1
    assert "quantisation" in unknown.stderr
