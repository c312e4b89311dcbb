"""Flags of single stages reach their configuration, and the help names what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_runs import read_results, run_config, run_stages, run_values, write_config
from typer.testing import CliRunner

import weaver.cli.app
from weaver.artifacts.manifest import read_manifest
from weaver.config.sections import PartitionConfig
from weaver.methods.registry import METHODS
from weaver.methods.routers import ROUTERS
from weaver.report.tables import format_count
from weaver.training.presets import PRESETS


def invoke(*words: str | Path) -> str:
    result = CliRunner().invoke(weaver.cli.app.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def help_of(command: str, name: str) -> str:
    group: Any = typer.main.get_command(weaver.cli.app.app)
    (option,) = [each for each in group.commands[command].params if each.name == name]
    text: str = option.help
    return text


def config_of(run_dir: Path, stage: str) -> dict[str, Any]:
    return read_manifest(run_dir / stage, rebuild="").request.config


def test_help_names_every_method_and_router() -> None:
    # Written out there, because help must not wait for torch.
    text = help_of("partition", "method").partition(".")[0]
    names = re.findall(r"[a-z][a-z-]+", text)
    assert [name for name in names if name != "or"] == list(METHODS)
    assert names[0] == PartitionConfig().method
    routers = help_of("build-router", "kind").partition(";")[0]
    assert re.findall(r"[a-z][a-z-]+", routers.replace(" or ", " ")) == list(ROUTERS)


@pytest.fixture
def calibrated(tiny_llama: Path, tmp_path: Path) -> Path:
    run_stages(run_config(tiny_llama), tmp_path / "run", until="calibrate")
    return tmp_path / "run"


def test_partition_flags(calibrated: Path) -> None:
    words = ("partition", "--run-dir", calibrated, "--num-experts", "16", "--allocation", "fisher")
    output = invoke(*words, "--set", "router.refit=false")

    assert "weave (scope: ffn)" in output
    config = config_of(calibrated, "partition")
    assert (config["num_experts"], config["allocation"]) == (16, "fisher")
    assert config["propagate"]["refit"] is False
    assert config["propagate"]["constants"] is True
    assert (calibrated / "partition" / "budget.json").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {"kind": "ridge", "refit": True, "constants": True}),
        (("--no-refit",), {"kind": "ridge", "refit": False, "constants": True}),
        (("--no-constants",), {"kind": "ridge", "refit": True, "constants": False}),
    ],
)
def test_build_router_flags(
    flags: tuple[str, ...], expected: dict[str, Any], calibrated: Path
) -> None:
    invoke("partition", "--run-dir", calibrated, "--num-experts", "8", "--one-shot")
    output = invoke("build-router", "--run-dir", calibrated, *flags)

    assert "router ridge" in output
    config = config_of(calibrated, "router")
    assert {key: config[key] for key in expected} == expected


def test_compensation_of_a_method_that_has_none_by_default(calibrated: Path) -> None:
    invoke("partition", "--run-dir", calibrated, "--method", "flap")
    output = invoke("build-router", "--run-dir", calibrated, "--refit", "--constants")

    assert "static layers: no router" in output
    assert len(list((calibrated / "router" / "compensation").iterdir())) == 4


def test_eval_and_run_print_the_measured_flops(tiny_llama: Path, tmp_path: Path) -> None:
    values = run_values(tiny_llama, partition={"method": "weave"})
    config = write_config(tmp_path / "run.yaml", values)
    run_dir = tmp_path / "run"

    output = invoke("run", config, "--run-dir", run_dir)

    results = read_results(run_dir)
    measured, dense = results["measured_ffn_flops_per_token"], results["dense"]
    assert measured != results["moe"]["ffn_flops_per_token"]
    ratio = measured / dense["ffn_flops_per_token"]
    assert f"measured FFN FLOPs x{ratio:.3f}" in output
    line = next(line for line in output.splitlines() if "FFN FLOPs per token, measured" in line)
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[3] == format_count(measured)
    summary = json.loads((run_dir / "eval" / "manifest.json").read_text())["summary"]
    assert summary["measured_ffn_flops"] == measured


def test_finetune_flags(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    words = ("finetune", "--run-dir", tmp_path, "--preset", "distill-2k", "--trainable", "lora")
    sizes = ("--steps", "2", "--batch-size", "1", "--sequence-length", "32")
    output = invoke(*words, *sizes, "--set", "finetune.eval_windows=1")

    (phase,) = config_of(tmp_path, "finetune")["phases"]
    assert (phase["objective"], phase["trainable"], phase["steps"]) == ("distill", "lora", 2)
    assert phase["lora"]["rank"] == 64
    assert re.search(r"step 2: held-out perplexity [0-9.]+, KL [0-9.]+", output)
    assert re.search(r"held-out KL .* the weights of step [02]\n", output)


def test_the_help_shows_presets_and_defaults() -> None:
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", invoke("finetune", "--help")).split())
    assert "[default: 50]" in text
    group: Any = typer.main.get_command(weaver.cli.app.app)
    (preset,) = [each for each in group.commands["finetune"].params if each.name == "preset"]
    assert preset.metavar == "|".join(PRESETS)
