"""Commands and conversions that the makers of benchmarks, exports and served models share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STAGES = ("partition", "build-router", "assemble")


def weaver(*arguments: str | Path) -> None:
    """One command, as a user runs it."""
    words = [str(argument) for argument in arguments]
    print("weaver", *words, flush=True)
    subprocess.run([sys.executable, "-m", "weaver", *words], check=True)


def convert(run_dir: Path, calibration: Path, config: Path, *overrides: str) -> Path:
    """A conversion on the calibration of another run directory, which is made if it is not there.

    Args:
        run_dir: the run directory; finished stages are skipped.
        calibration: run directory of the calibration.
        config: a configuration file.
        overrides: ``section.key=value`` over the file, for the stages after calibrate.
    """
    weaver("calibrate", "--config", config, "--run-dir", calibration)
    changed = [word for override in overrides for word in ("--set", override)]
    for stage in STAGES:
        arguments: list[str | Path] = ["--config", config, "--run-dir", run_dir, *changed]
        if stage == "partition":
            arguments += ["--calibration", calibration / "calibrate"]
        weaver(stage, *arguments)
    return run_dir
