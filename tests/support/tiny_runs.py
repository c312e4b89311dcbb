"""Runs of the stages on a tiny model: configurations, in this process or in a real one."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.process
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from weaver.artifacts.manifest import (
    MANIFEST,
    StageManifest,
    outputs_digest,
    read_manifest,
    write_manifest,
)
from weaver.artifacts.store import file_digest
from weaver.cli.app import main
from weaver.config.loading import RunConfig, parse_config
from weaver.rundir.stage_folders import STAGE_FOLDERS
from weaver.rundir.stage_run import StageContext
from weaver.stages.pipeline import run_pipeline, stage_calls

_DEFAULTS: dict[str, dict[str, Any]] = {
    "calibrate": {"tokens": 512, "sequence_length": 64},
    "partition": {"method": "cmoe", "sparsity": 0.25, "num_experts": 8},
    # It loads both models and writes text; the tests of the smoke test switch it on.
    "assemble": {"smoke_test": False},
    "eval": {"sequence_length": 64, "windows": 4},
    "bench": {"tokens": [1], "decode_tokens": 0, "repeats": 1, "warmup": 0},
}


def run_values(model: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A small configuration; given sections are laid over its own, key by key."""
    names = _DEFAULTS.keys() | sections.keys()
    values = {name: {**_DEFAULTS.get(name, {}), **sections.get(name, {})} for name in names}
    return {"model": {"path": str(model)}, "seed": 0, **values}


def run_config(model: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """``run_values``, validated."""
    return parse_config(RunConfig, run_values(model, **sections), source="test")


def write_config(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a configuration as YAML."""
    path.write_text(yaml.safe_dump(dict(values)))
    return path


def run_stages(
    config: RunConfig, run_dir: Path, *, until: str = "bench", **context: Any
) -> dict[str, StageManifest]:
    """Run a configuration's stages in this process, up to and including one of them."""
    calls = stage_calls(config, context.pop("calibration", None))
    names = list(calls)
    chosen = {name: calls[name] for name in names[: names.index(until) + 1]}
    manifests: dict[str, StageManifest] = {}
    run_pipeline(StageContext(run_dir, **context), chosen, manifests.__setitem__)
    return manifests


def read_results(run_dir: Path) -> dict[str, Any]:
    """Read the ``eval/results.json`` of a run."""
    results: dict[str, Any] = json.loads((run_dir / "eval" / "results.json").read_text())
    return results


def stage_digests(run_dir: Path) -> dict[str, str]:
    """Digest of every finished stage, without bench, which measures time."""
    return {
        name: json.loads((run_dir / name / MANIFEST).read_text())["digest"]
        for name in STAGE_FOLDERS.values()
        if name != "bench" and (run_dir / name / MANIFEST).exists()
    }


def add_to_stage(folder: Path, paths: list[Path]) -> None:
    """Take files that were written or changed afterwards into a stage's manifest."""
    manifest = read_manifest(folder, rebuild="weaver run")
    changed = {str(path.relative_to(folder)): file_digest(path) for path in paths}
    outputs = dict(sorted({**manifest.outputs, **changed}.items()))
    digest = outputs_digest(outputs)
    write_manifest(folder, manifest.model_copy(update={"outputs": outputs, "digest": digest}))


def file_times(folder: Path) -> dict[str, int]:
    """Modification time of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def limit_file_size(size: int) -> None:
    """No file may grow above a number of bytes, in this process to its end."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow above a number of bytes in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_file_size(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def start_weaver(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the program, with this process's number of threads and without a network."""
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-m", "weaver", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run as a background job, Ctrl-C is ignored and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


# Forks of a process that has imported torch start in no time; each is a process of its own.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["without_network", "weaver.cli.app", "weaver.stages.pipeline", "accelerate", "tiny_models"]
)


def fork_weaver(
    log: Path,
    *arguments: str | Path,
    errors: Path | None = None,
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> multiprocessing.process.BaseProcess:
    """Start the program in a process of its own, without a network.

    Args:
        log: file of what it prints.
        arguments: of the program.
        errors: file of what it prints to standard error; ``log`` by default.
        threads: of torch; by default as many as here.
        environment: variables that it has beside those of this process.
        prepare: is called there before the program starts.
    """
    words = [str(argument) for argument in arguments]
    count = threads or torch.get_num_threads()
    start = partial(_prepared, {**os.environ, **(environment or {})}, Path.cwd(), count, prepare)
    process = _FORKS.Process(target=_weaver_main, args=(words, (log, errors), start))
    process.start()
    return process


def _prepared(
    environment: dict[str, str], folder: Path, threads: int, prepare: Callable[[], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(threads)
    if prepare is not None:
        prepare()


def _weaver_main(
    arguments: list[str], files: tuple[Path, Path | None], start: Callable[[], None]
) -> None:
    log, errors = files
    for stream, file in ((sys.stdout, log), (sys.stderr, errors)):
        # Both streams of one file have one place in it.
        target = sys.stdout.fileno() if file is None else os.open(file, _NEW_FILE)
        os.dup2(target, stream.fileno())
    start()
    sys.argv = ["weaver", *arguments]
    main()


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def run_weaver(
    *arguments: str | Path, prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, as ``fork_weaver`` starts it."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = fork_weaver(out, *arguments, errors=err, prepare=prepare)
        code = finished(process)
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def finished(process: multiprocessing.process.BaseProcess, seconds: float = 120) -> int:
    """Exit code of a process at its end; one that does not end is killed, and the test fails."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"alive after {seconds} s")
    return process.exitcode
