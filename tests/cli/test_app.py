"""The program as a process: signals, launchers, output that cannot be written, hostile names."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import fork_weaver, run_config, run_stages, run_values, start_weaver, write_config
from typer.testing import CliRunner

import weaver.cli.app
from weaver.cli.app import main
from weaver.cli.session import is_follower
from weaver.report.terminal import make_console
from weaver.rundir.lock import locked

CALIBRATE = ("--tokens", "512", "--sequence-length", "64")


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_a_signal_says_how_to_go_on(
    number: signal.Signals, name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Sent when the first stage has begun, which is then far from its end."""
    values = run_values(tiny_llama, calibrate={"tokens": 200_000, "sequence_length": 64})
    config = write_config(tmp_path / "run.yaml", values)
    # A handled signal is the default one in a child; an ignored one, as under nohup, stays ignored.
    before = signal.signal(number, lambda *_: None)
    try:
        process = start_weaver("run", config, "--run-dir", tmp_path / "run")
    finally:
        signal.signal(number, before)
    with process:
        layers = tmp_path / "run" / "calibrate"
        while not (layers / "stage.json").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "error: interrupted" in err
    assert f"why: {name}; finished layers and stages are kept" in err
    assert "Traceback" not in err


def test_a_launcher_makes_no_followers_of_commands_that_are_not_distributed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["calibrate", str(tiny_llama), "-r", str(tmp_path), *CALIBRATE]
    with locked(tmp_path):
        refused = CliRunner().invoke(weaver.cli.app.app, arguments)
    assert refused.exit_code == 1
    assert "another weaver process is at work here" in refused.stderr
    done = CliRunner().invoke(weaver.cli.app.app, arguments)
    assert done.exit_code == 0
    assert "calibrate" in done.stdout


@pytest.mark.parametrize(
    ("stage", "rank", "count", "follows"),
    [
        ("finetune", "1", "2", True),
        ("finetune", "0", "2", False),
        # Left over from a launcher that has ended: one process, which holds the lock and speaks.
        ("finetune", "1", None, False),
        ("finetune", "1", "1", False),
        ("finetune", "x", "2", False),
        ("eval", "1", "2", False),
    ],
)
def test_who_trains_beside_a_main_process(
    stage: str, rank: str, count: str | None, follows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count is not None:
        monkeypatch.setenv("WORLD_SIZE", count)
    assert is_follower(stage) is follows


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [("--version",), ("inspect", "RUN")])
def test_output_that_cannot_be_written(
    arguments: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="calibrate")
    words = [str(tmp_path) if word == "RUN" else word for word in arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "weaver", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "why: No space left on device" in done.stderr


@pytest.mark.parametrize(
    "name", ["~nobody-of-this-name/model", "x" * 5000, "a\0b", "owner/" + "y" * 300]
)
@pytest.mark.parametrize("command", ["calibrate", "generate"])
def test_names_that_no_file_can_have(command: str, name: str, tmp_path: Path) -> None:
    more = ["text"] if command == "generate" else ["-r", str(tmp_path)]
    done = CliRunner().invoke(weaver.cli.app.app, [command, name, *more])
    assert done.exit_code == 1, done.output
    assert re.match(r"error: .+\n  why: .+\n  fix: .+\n\Z", done.stderr), done.stderr
    assert len(done.stderr) < 1000


def test_escape_sequences_out_of_files_do_not_reach_the_terminal(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model\x1b]0;title\x07"
    shutil.copytree(tiny_llama, model)
    (model / "config.json").unlink()
    done = CliRunner().invoke(weaver.cli.app.app, ["calibrate", str(model), "-r", str(tmp_path)])
    assert r"model\x1b]0;title" in done.stderr
    assert "\x1b" not in done.output

    printed = io.StringIO()
    console = make_console(file=printed, force_terminal=True, width=80, highlight=False)
    console.print("[red]a\x1b[2Jb\x9b1m\u202etxt[/red]")
    assert printed.getvalue() == "\x1b[31ma\\x1b[2Jb\\x9b1m\\u202etxt\x1b[0m\n"


def test_a_killed_process_leaves_no_lock(tiny_llama: Path, tmp_path: Path) -> None:
    """And a lock that is a link to somebody's file leaves that file alone."""
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    process = fork_weaver(
        tmp_path / "log", "calibrate", tiny_llama, "-r", tmp_path / "run", *CALIBRATE
    )
    process.join(60)
    assert process.exitcode == 1
    assert precious.read_text() == "years of work"
    assert os.path.islink(tmp_path / "run" / ".lock")
    assert "is a symbolic link" in (tmp_path / "log").read_text()


def test_ctrl_c_while_commands_are_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weaver.cli.app.app", interrupted)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted before anything was begun\n"
