"""Attacks on whole commands: kills and signals, disks that are full or read-only, repetitions.

A round is one configuration, its stages and exports one command each or all of them in one.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_runs import (
    fork_weaver,
    run_values,
    stage_digests,
    write_config,
)

from weaver.artifacts.manifest import MANIFEST, read_manifest
from weaver.methods.registry import METHODS
from weaver.rundir.stage_folders import STAGE_FOLDERS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS = 300
# What every third round of commands is, one after the other.
FORMS = ("stages", "stages, forced", "run")
# The method whose rounds have a linear router and top-k, as stock architectures do.
STOCK = "cmoe"
Counts = collections.Counter[str]
Words = tuple[str | Path, ...]
_FINETUNE: dict[str, Any] = {
    **{"steps": 2, "batch_size": 1, "sequence_length": 32, "checkpoint_every": 1},
    **{"evaluate_every": 1, "eval_windows": 2, "eval_sequence_length": 32},
}


@dataclass(frozen=True)
class Round:
    """A configuration under attack: one method, as single stages or as one ``run``.

    Args:
        number: of the round; method and form follow from it.
        config: its file.
        folder: for its run directories.
    """

    number: int
    config: Path
    folder: Path

    @classmethod
    def make(cls, number: int, model: Path, folder: Path) -> Round:
        """Write the configuration of a round into a folder that is made."""
        folder.mkdir()
        spec = list(METHODS.values())[number % len(METHODS)]
        partition: dict[str, Any] = {"method": spec.name}
        if spec.prunes_groups or spec.router is None:
            # The text has six groups; static methods have no experts.
            partition["num_experts"] = 6 if spec.prunes_groups else None
        values = run_values(
            model,
            calibrate={"groups": spec.prunes_groups},
            partition=partition,
            router={"kind": "ridge"} if spec.name == STOCK else {},
            finetune=_FINETUNE,
        )
        return cls(number, write_config(folder / "config.yaml", values), folder)

    @property
    def method(self) -> str:
        """Name of its method."""
        return list(METHODS)[self.number % len(METHODS)]

    @property
    def form(self) -> str:
        """How its commands are given."""
        return FORMS[self.number % len(FORMS)]

    def commands(self, run_dir: Path, *, form: str | None = None) -> dict[str, Words]:
        """The commands of the round by name, in their order."""
        exports: dict[str, Words] = {
            f"export {target}": ("export", run_dir, "--to", target) for target in self.targets
        }
        if (form or self.form) == "run":
            return {"run": ("run", self.config, "--run-dir", run_dir), **exports}
        where = ("--run-dir", run_dir, "--config", self.config)
        return {**{stage: (stage, *where) for stage in STAGE_FOLDERS}, **exports}

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets that hold the model."""
        return ("weaver", "glm4-moe", "gguf") if self.method == STOCK else ("weaver",)


def run(folder: Path, words: Words, **options: Any) -> tuple[int | None, str]:
    """A command to its end: exit code and what it printed."""
    log = folder / "log"
    process = fork_weaver(log, *words, **options)
    process.join(SECONDS)
    return process.exitcode, log.read_text()


def finish(round_: Round, run_dir: Path, *, form: str | None = None) -> dict[str, float]:
    """Every command of a round, undisturbed; seconds of each.

    Raises:
        RuntimeError: one failed.
    """
    seconds: dict[str, float] = {}
    for name, words in round_.commands(run_dir, form=form).items():
        started = time.monotonic()
        code, said = run(round_.folder, words)
        if code != 0:
            raise RuntimeError(f"round {round_.number}, {name}: exit code {code}: {said[-600:]}")
        seconds[name] = time.monotonic() - started
    return seconds


def digests(run_dir: Path) -> dict[str, str]:
    """Digest of every finished stage and export."""
    exports = {
        path.name: read_manifest(path, rebuild="").digest
        for path in run_dir.glob("export-*")
        if (path / MANIFEST).exists()
    }
    return stage_digests(run_dir) | exports


def stopped(round_: Round, kills: int) -> tuple[Counts, str]:
    """Stop every command of a round again and again at random moments, then let it end.

    SIGKILL is four of five; the other signals must be told as interruptions.

    Args:
        round_: the round.
        kills: of each command; three times as many of a ``run``.

    Returns:
        How many were sent to which command, as "COMMAND SIGNAL", and "clean" or what went wrong.
    """
    whole, run_dir = round_.folder / "whole", round_.folder / "run"
    seconds = finish(round_, whole)
    force: Words = ()
    if round_.form == "stages, forced":
        shutil.copytree(whole, run_dir)
        force = ("--force",)
    sent, random_ = Counts(), random.Random(f"kill:{round_.number}")
    for name, words in round_.commands(run_dir).items():
        # A run is all stages: it has more moments, and goes on where it was stopped.
        for _ in range(3 * kills if name == "run" else kills):
            wrong = _stop(round_, name, (*words, *force), random_.uniform(0, seconds[name]), sent)
            if wrong:
                return sent, wrong
        code, said = run(round_.folder, (*words, *force))
        if code != 0:
            return sent, f"round {round_.number}, {name}: exit code {code}, {said[-600:]}"
    if digests(run_dir) != digests(whole):
        return sent, f"round {round_.number}: {digests(run_dir)}, not {digests(whole)}"
    left = [p for p in run_dir.rglob(".*") if p.name != ".lock"]
    return sent, f"round {round_.number}: left {left}" if left else "clean"


def _stop(round_: Round, name: str, words: Words, moment: float, sent: Counts) -> str:
    """Stop one command, if it is not over; empty, or what went wrong."""
    log = round_.folder / "log"
    process = fork_weaver(log, *words)
    process.join(moment)
    if not process.is_alive():
        return ""
    random_ = random.Random(moment)
    which = signal.SIGKILL if random_.random() < 0.8 else random_.choice(SIGNALS)
    pid = process.pid
    assert pid is not None
    os.kill(pid, which)
    process.join(60)
    sent[f"{name} {which.name}"] += 1
    if process.exitcode is None:
        return f"round {round_.number}, {name}: alive 60 s after {which.name}"
    if "Traceback" in log.read_text():
        return f"round {round_.number}, {name}: traceback after {which.name}: {_tail(log)}"
    return ""


def _tail(log: Path) -> str:
    return log.read_text()[-600:]


def without_room(round_: Round, form: str) -> tuple[Counts, str]:
    """Every command of a round on a disk without room, then again with room.

    Args:
        round_: the round.
        form: "full", where no file grows above some bytes, or "read-only", in another user's
            folder.

    Returns:
        How many commands were refused with one error or had room, as "FORM OUTCOME", and "clean"
        or what went wrong.
    """
    run_dir, random_ = round_.folder / form, random.Random(f"{form}:{round_.number}")
    run_dir.mkdir()
    found = Counts()
    for name, words in round_.commands(run_dir, form="stages").items():
        before = _files(run_dir)
        prepare = _Limit(random_.choice((500, 5_000, 50_000))) if form == "full" else _nobody
        with _modes(run_dir, 0o555 if form == "read-only" else 0o755):
            code, said = run(round_.folder, words, prepare=prepare)
        if code == 1 and "error:" in said and "Traceback" not in said:
            found[f"{form} refused"] += 1
        elif code == 0 and form == "full":
            found[f"{form} had room"] += 1
        else:
            return found, f"round {round_.number}, {name}, {form}: exit code {code}, {said[-600:]}"
        if form == "read-only" and _files(run_dir) != before:
            return found, f"round {round_.number}, {name}: wrote into a read-only folder"
        code, said = run(round_.folder, words)
        if code != 0:
            return found, f"round {round_.number}, {name}, again: exit {code}, {said[-600:]}"
    same = digests(run_dir) == digests(round_.folder / "whole")
    return found, "clean" if same else f"round {round_.number}, {form}: other digests"


@contextmanager
def _modes(folder: Path, mode: int) -> Iterator[None]:
    """Every folder below one with other rights, for a while."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(mode)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


def _files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


class _Limit:
    """Before a command begins: no file may grow above some bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def _nobody() -> None:
    """Before a command begins: become a user who owns nothing, where that is allowed."""
    with suppress(PermissionError):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def repeated(round_: Round) -> dict[str, tuple[bool, bool]]:
    """Whether each stage and export of a round gives the same digest again, and with two threads.

    The second run is a ``run``, the third is that with two threads.
    """
    first = digests(round_.folder / "whole")
    again, threads = round_.folder / "again", round_.folder / "threads"
    finish(round_, again, form="run")
    for words in round_.commands(threads, form="run").values():
        run(round_.folder, words, threads=2)
    second, third = digests(again), digests(threads)
    return {name: (second.get(name) == d, third.get(name) == d) for name, d in first.items()}
