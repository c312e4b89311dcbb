"""Commands and conversions that the makers of tables share."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("partition", "build-router", "assemble")


def weaver(*arguments: str | Path) -> None:
    """One command, as a user runs it."""
    words = [str(argument) for argument in arguments]
    print("weaver", *words, flush=True)
    subprocess.run([sys.executable, "-m", "weaver", *words], check=True)


def set_words(overrides: Sequence[str]) -> list[str]:
    """``section.key=value`` texts as words of a command."""
    return [word for override in overrides for word in ("--set", override)]


def convert(
    run_dir: Path,
    calibration: Path,
    config: Path,
    *overrides: str,
    calibrate: Sequence[str | Path] = (),
) -> Path:
    """A conversion on the calibration of another run directory, which is made if it is not there.

    Args:
        run_dir: the run directory; finished stages are skipped.
        calibration: run directory of the calibration.
        config: a configuration file.
        overrides: ``section.key=value`` over the file, for the stages after calibrate.
        calibrate: more words for ``weaver calibrate``.
    """
    weaver("calibrate", "--config", config, "--run-dir", calibration, *calibrate)
    changed = set_words(overrides)
    for stage in STAGES:
        arguments: list[str | Path] = ["--config", config, "--run-dir", run_dir, *changed]
        if stage == "partition":
            arguments += ["--calibration", calibration / "calibrate"]
        weaver(stage, *arguments)
    return run_dir


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a stage wrote, such as its results or its manifest."""
    values: dict[str, Any] = json.loads(path.read_text())
    return values
