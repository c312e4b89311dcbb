"""Each bad input gives one clear error, exit code 1, and loses nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import typer
from tiny_runs import (
    file_size_limit,
    file_times,
    limit_file_size,
    run_config,
    run_stages,
    run_values,
    run_weaver,
    stage_digests,
    write_config,
)
from typer.testing import CliRunner, Result

import weaver.cli.app
from weaver.artifacts.manifest import SCHEMA_VERSION, read_manifest
from weaver.errors import WeaverError

COMMANDS = [
    *("convert", "calibrate", "partition", "build-router", "assemble"),
    *("finetune", "generate", "eval", "bench", "run", "inspect", "export", "verify"),
    *("pareto", "bench-layer", "push"),
]
CALIBRATE = ("--tokens", "512", "--sequence-length", "64")


def _invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(weaver.cli.app.app, [str(argument) for argument in arguments])


def _known_flags() -> set[str]:
    group = typer.main.get_command(weaver.cli.app.app)
    flags = {flag for parameter in group.params for flag in parameter.opts}
    for command in group.commands.values():  # type: ignore[attr-defined]
        for parameter in command.params:
            flags |= {*parameter.opts, *parameter.secondary_opts}
    return flags


def _check_fix(fix: str) -> None:
    """Check that every command and flag that the advice names exists."""
    assert set(re.findall(r"weaver ([a-z][a-z-]+)", fix)) <= set(COMMANDS)
    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", fix)) <= _known_flags()


def _error(result: Result) -> tuple[str, str, str]:
    """The three lines on standard error, checked for their form."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    match = re.search(
        r"^error: (.+)\n  why: (.+)\n  fix: (.+)\n\Z", result.stderr, re.MULTILINE | re.DOTALL
    )
    assert match, result.stderr
    what, why, fix = match.groups()
    assert what.strip()
    assert why.strip()
    _check_fix(fix)
    return what, why, fix


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def calibrated(model: Path, tmp_path: Path) -> Path:
    """A run directory with a finished calibration of that copy."""
    run_stages(run_config(model), tmp_path / "run", until="calibrate")
    return tmp_path / "run"


def _edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _foreign(model: Path) -> None:
    _edit_config(model, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def _without_gate(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "gate_proj" not in name}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def _truncate(name: str) -> Callable[[Path], None]:
    def cut(model: Path) -> None:
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[: len(content) // 2])

    return cut


def _remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, r"model: no such model"),
        (_remove("config.json"), r"no configuration that transformers can load"),
        (_truncate("config.json"), r"no configuration that transformers can load"),
        (_remove("model.safetensors"), r"no \*\.safetensors file"),
        (_truncate("model.safetensors"), r"model\.safetensors: damaged, \d+ bytes instead of \d+"),
        (_remove("tokenizer.json"), r"no tokenizer"),
        (_truncate("tokenizer.json"), r"no tokenizer"),
        (_foreign, r"model_type 'gpt2' is not in the family table"),
        (_without_gate, r"no GLU feed-forward found, 'model.layers.0.mlp.gate_proj.weight'"),
        (lambda model: _edit_config(model, hidden_act="relu6"), r"activation 'relu6' is not known"),
    ],
    ids=[
        *("missing", "no-config", "cut-config", "no-weights", "cut-weights", "no-tokenizer"),
        *("cut-tokenizer", "foreign", "not-glu", "activation"),
    ],
)
def test_a_bad_model(
    damage: Callable[[Path], None], expected: str, model: Path, tmp_path: Path
) -> None:
    damage(model)

    result = _invoke("calibrate", model, "--run-dir", tmp_path / "run", *CALIBRATE)

    assert re.search(expected, _error(result)[0])
    assert not (tmp_path / "run" / "calibrate").exists()


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("", (), r"text\.txt: holds no text"),
        ("short", (), r"text\.txt has 6 tokens, 512 are wanted from it"),
        ("short", ("--tokens", "32"), r"32 tokens do not fill one window of 64"),
        (
            "a" * 600,
            ("--set", "calibrate.activation_top_k=65"),
            r"activation_top_k=65 of 64 neurons",
        ),
        ("a" * 600, ("--set", "calibrate.data=[]"), r"data"),
        (None, (), r"text\.txt: no such data"),
    ],
    ids=["empty", "too-short", "no-window", "markers", "no-source", "missing"],
)
def test_bad_data(
    text: str | None, flags: tuple[str, ...], expected: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if text is not None:
        path.write_text(text)
    data = () if "--set" in flags else ("--data", path)

    result = _invoke("calibrate", model, "-r", tmp_path / "run", *data, *CALIBRATE, *flags)

    assert re.search(expected, _error(result)[0])
    assert not (tmp_path / "run" / "calibrate").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--sparsity", "0.95"), r"sparsity 0\.95 leaves 0 of 8 experts active"),
        (("--sparsity", "0.01"), r"sparsity 0\.01 leaves 8 of 8 experts active"),
        (("--sparsity", "1.5"), r"sparsity: Input should be less than 1"),
        (("--num-experts", "7"), r"64 neurons do not divide into 7 experts"),
        (("--num-experts", "1"), r"num_experts=1"),
        (("--expert-width-multiple", "128"), r"an expert would be empty"),
        (("--method", "nonesuch"), r"unknown method 'nonesuch'"),
        (("--allocation", "fair"), r"allocation: Input should be 'uniform', 'adaptive'"),
        (("--set", "partition.options={nonesuch: 1}"), r"options of method cmoe: nonesuch"),
        (("--set", "partition.nonesuch=1"), r"nonesuch: Extra inputs are not permitted$"),
        (("--set", "partition.sparsty=1"), r"not permitted, did you mean sparsity\?$"),
        (("--method", "flap"), r"flap with 8 experts"),
        (("--set", "partitoin.sparsity=0.5"), r"no section is called partitoin"),
        (("--set", "partition=5"), r"section partition is a int"),
        (("--set", "sparsity"), r"override 'sparsity' has no '='"),
        (("--set", "partition.sparsity=["), r"the value is not YAML"),
        (("--set", "seed=often"), r"seed 'often' is not a whole number"),
        (("--set", "router.kind=nonesuch"), r"unknown router 'nonesuch'"),
        (("--config", "nonesuch.yaml"), r"nonesuch\.yaml: no such config file"),
    ],
)
def test_a_bad_partition(flags: tuple[str, ...], expected: str, calibrated: Path) -> None:
    before = file_times(calibrated)

    result = _invoke(
        "partition", "-r", calibrated, "--method", "cmoe", "--num-experts", "8", *flags
    )

    assert re.search(expected, _error(result)[0])
    assert not (calibrated / "partition").exists()
    assert {k: v for k, v in file_times(calibrated).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


def test_no_model_is_named(tmp_path: Path) -> None:
    what, _, fix = _error(_invoke("calibrate", "-r", tmp_path / "run"))
    assert what == "no model is named"
    assert "weaver calibrate MODEL" in fix
    what, _, fix = _error(_invoke("calibrate", __file__, "-r", tmp_path / "run"))
    assert what == f"{__file__}: a file, and not a model"
    assert "make" not in fix


def test_another_method_is_one_difference(calibrated: Path) -> None:
    assert _invoke("partition", "-r", calibrated, "--method", "random").exit_code == 0
    what, _, _ = _error(_invoke("partition", "-r", calibrated, "--method", "flap"))
    assert what.endswith("another configuration: method: 'random' on disk, 'flap' asked for")


def test_fewer_windows_than_asked_for_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    text = tmp_path / "text.txt"
    text.write_text("The ferry leaves at noon. " * 20)
    few = ("--sequence-length", "64", "--data", text)
    result = _invoke("eval", "-r", tmp_path, *few, "--windows", "100")
    assert "the text holds 8 windows of the 100 that were asked for" in result.output
    again = _invoke("eval", "-r", tmp_path, *few, "--windows", "8", "--force")
    assert "asked for" not in again.output


def test_short_help() -> None:
    assert _invoke("partition", "-h").output == _invoke("partition", "--help").output


def test_bad_flags_of_later_stages(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    router = _invoke("build-router", "-r", tmp_path, "--router", "nonesuch")
    shard = _invoke("assemble", "-r", tmp_path, "--max-shard-size", "many")
    tokens = _invoke("bench", "-r", tmp_path, "--tokens", "0")
    task = _invoke("eval", "-r", tmp_path, "--sequence-length", "64", "--task", "nonesuch.jsonl")
    text = _invoke("eval", "-r", tmp_path, "--sequence-length", "64", "--data", "nonesuch.txt")

    assert "unknown router 'nonesuch'" in _error(router)[0]
    assert "size 'many' is not understood" in _error(shard)[0]
    assert "tokens.0: Input should be greater than 0" in _error(tokens)[0]
    assert "nonesuch.jsonl" in _error(task)[0]
    assert "nonesuch.txt: no such data" in _error(text)[0]
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_profile_of_another_model_or_tokenizer(what: str, model: Path, calibrated: Path) -> None:
    if what == "model":
        path = model / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path = model / "tokenizer.json"
        path.write_text(path.read_text() + " ")

    result = _invoke("partition", "--run-dir", calibrated, "--num-experts", "8")

    message, why, fix = _error(result)
    assert f"profile of another {what}" in message
    assert "changed after the calibration" in why
    assert fix == f"weaver calibrate {model} --run-dir {calibrated} --force"


def test_a_model_that_is_gone_after_the_calibration(model: Path, calibrated: Path) -> None:
    shutil.rmtree(model)

    assert "no such model" in _error(_invoke("partition", "--run-dir", calibrated))[0]


def test_a_manifest_of_another_schema(calibrated: Path) -> None:
    path = calibrated / "calibrate" / "manifest.json"
    other = SCHEMA_VERSION + 1
    written = path.read_text().replace(
        f'"schema_version": {SCHEMA_VERSION}', f'"schema_version": {other}'
    )
    path.write_text(written)

    assert f"schema version {other}" in _error(_invoke("partition", "--run-dir", calibrated))[0]


def test_a_truncated_profile(calibrated: Path) -> None:
    path = calibrated / "calibrate" / "layer_002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    message, _, fix = _error(_invoke("partition", "--run-dir", calibrated))

    assert "layer_002.safetensors: damaged" in message
    assert "layer_002.safetensors" in fix


def test_an_unwritable_folder(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    result = _invoke("calibrate", tiny_llama, "-r", tmp_path / "file" / "run", *CALIBRATE)

    assert _error(result)[1] == "Not a directory"


def test_a_full_disk_and_then_room_again(tiny_llama: Path, tmp_path: Path) -> None:
    """The first process may not write files above 40 kB: a profile does not fit."""
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", run_values(tiny_llama))

    small = partial(limit_file_size, 40_000)
    full = run_weaver("run", config, "--run-dir", run_dir, prepare=small)
    _check_one_error(full, "layer_000.safetensors: cannot be written")
    assert not list(run_dir.rglob(".*tmp*"))

    run_stages(run_config(tiny_llama), run_dir, until="eval")
    run_stages(run_config(tiny_llama), tmp_path / "other", until="eval")
    assert stage_digests(run_dir) == stage_digests(tmp_path / "other")


@pytest.mark.parametrize("limit", [1000, 4000], ids=["config.json", "tokenizer.json"])
def test_a_full_disk_while_other_libraries_write(
    limit: int, tiny_llama: Path, tmp_path: Path
) -> None:
    """The shards are there already; config.json or tokenizer.json does not fit any more."""
    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    before = stage_digests(tmp_path)
    for name in ("manifest.json", "config.json", "tokenizer.json"):
        (tmp_path / "model" / name).unlink()
    refused = pytest.raises(WeaverError, match="model: cannot be written")
    with file_size_limit(limit), refused:
        run_stages(run_config(tiny_llama), tmp_path, until="assemble")

    run_stages(run_config(tiny_llama), tmp_path, until="assemble")
    assert stage_digests(tmp_path) == before


def _check_one_error(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert done.returncode == 1, done.stderr
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonesuch",),
        ("calibrate",),
        ("calibrate", "--nonesuch"),
        ("partition", "--run-dir", "x", "--num-experts", "many"),
        ("run", "--run-dir", "x"),
        ("inspect",),
    ],
)
def test_usage_errors_exit_2(arguments: tuple[str, ...]) -> None:
    result = _invoke(*arguments)

    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_debug_shows_where_the_error_comes_from(tmp_path: Path) -> None:
    result = _invoke("--debug", "inspect", tmp_path)

    assert isinstance(result.exception, WeaverError)
    assert result.exit_code == 1


def test_inspect_exits_1_when_something_is_damaged(calibrated: Path) -> None:
    good = _invoke("inspect", calibrated, "--verify")
    (calibrated / "calibrate" / "layer_001.safetensors").unlink()
    bad = _invoke("inspect", calibrated)

    assert good.exit_code == 0
    assert bad.exit_code == 1
    assert "damaged" in bad.output


def test_inspect_as_json(calibrated: Path) -> None:
    (row,) = json.loads(_invoke("inspect", calibrated, "--json").stdout)
    manifest = read_manifest(calibrated / "calibrate", rebuild="")
    assert (row["stage"], row["state"], row["digest"]) == ("calibrate", "complete", manifest.digest)
    assert row["summary"] == manifest.summary


def test_nothing_is_cut_off_in_a_pipe(calibrated: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    command = [sys.executable, "-m", "weaver", "inspect", str(calibrated)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "…" not in done.stdout
    assert read_manifest(calibrated / "calibrate", rebuild="").finished_at in done.stdout


def test_help_and_version_start_without_torch() -> None:
    """One process asks every subcommand for help; importing torch would take seconds each time."""
    script = f"""
import sys
sys.argv = ["weaver"]
from typer.testing import CliRunner, Result
from weaver.cli.app import app
for arguments in [["--help"], ["--version"], *([name, "--help"] for name in {COMMANDS})]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output)
    assert "Usage" in result.output or arguments == ["--version"], arguments
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_package_started_as_a_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "weaver", "--version"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout), done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["calibrate", "convert", "run", "generate"])
def test_a_gpu_that_is_not_there(
    command: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", run_values(tiny_llama))
    arguments: dict[str, list[str | Path]] = {
        "calibrate": [tiny_llama, "--run-dir", run_dir],
        "convert": [tiny_llama, run_dir],
        "run": [config, "--run-dir", run_dir],
        "generate": [tiny_llama, "The whale"],
    }
    result = _invoke(command, *arguments[command], "--device", "cuda")
    assert result.exit_code == 1
    assert "torch finds no GPU" in " ".join(result.output.split())
    assert not run_dir.exists()
