"""Attack weaver with malformed inputs, corruptions, kills and signals; write docs/reliability.md.

Bounded by ``--minutes``; every input and moment comes from a seed, so that what went wrong can be
repeated. Exits non-zero if anything did.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from attack_inputs import KINDS, attack
from byte_tokenizer import byte_tokenizer
from tiny_models import save_tiny_model
from tiny_runs import (
    fork_weaver,
    run_config,
    run_stages,
    run_values,
    stage_digests,
    write_config,
)

from weaver.artifacts.manifest import read_manifest
from weaver.errors import WeaverError
from weaver.report.tables import markdown_table
from weaver.rundir.stage_folders import check_contents

DOCUMENT = Path("docs/reliability.md")
# Shares of the time, and the number of inputs after which the rest of it goes to kills.
INPUTS = 10_000
STAGES = ("calibrate", "partition", "router", "model", "eval")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Counts = collections.Counter[str]


def tiny_model(folder: Path) -> Path:
    """The model under attack: a Llama of four layers with random weights."""
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "intermediate_size": 64}
    save_tiny_model("llama", folder, byte_tokenizer(), max_position_embeddings=512, **sizes)
    return folder


def malformed(model: Path, count: int, deadline: float) -> dict[str, Counts]:
    """Outcomes of malformed inputs by kind, in turn, until there are so many or time is up."""
    found: dict[str, Counts] = {kind: collections.Counter() for kind in KINDS}
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        if time.monotonic() > deadline:
            break
        with tempfile.TemporaryDirectory() as folder:
            outcome = attack(kind, number, model, Path(folder))
        found[kind][outcome] += 1
        if outcome not in ("refused", "accepted"):
            print(f"{kind}, seed {number}: {outcome}", flush=True)
    return found


def corruptions(model: Path, folder: Path, flips: int) -> Counts:
    """Flip one bit of an output at a time: what a later stage reads must be refused by name."""
    run_dir, found = folder / "corrupt", Counts()
    run_stages(run_config(model), run_dir, until="eval")
    for number in range(flips):
        random_ = random.Random(f"flip:{number}")
        stage = run_dir / STAGES[number % len(STAGES)]
        manifest = read_manifest(stage, rebuild="")
        path = stage / random_.choice(sorted(manifest.outputs))
        whole = path.read_bytes()
        content = bytearray(whole)
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        path.write_bytes(bytes(content))
        try:
            check_contents(stage, manifest)
            found["accepted"] += 1
            print(f"{path.relative_to(run_dir)}, flip {number}: accepted", flush=True)
        except WeaverError as error:
            found["refused" if str(path) in error.what else "misnamed"] += 1
        path.write_bytes(whole)
    return found


def stopped(model: Path, folder: Path, number: int, *, kills: int) -> tuple[Counts, str]:
    """Stop a run again and again at random moments, then let it end; digests decide.

    Every third run is one with ``--force`` over a finished one. SIGKILL alternates with signals
    that a program may answer; those must be told as interruptions.

    Returns:
        How many of each were sent, and "clean" or what went wrong.
    """
    values = run_values(model, partition={"method": ("cmoe", "weave", "flap")[number % 3]})
    if values["partition"]["method"] == "flap":
        values["partition"]["num_experts"] = None
    config = write_config(folder / f"{number}.yaml", values)
    whole, run_dir, log = folder / f"{number}-whole", folder / f"{number}-run", folder / "log"
    started = time.monotonic()
    _run(log, config, whole)
    seconds = time.monotonic() - started
    force = ("--force",) if number % 3 == 2 else ()
    if force:
        shutil.copytree(whole, run_dir)
    sent, random_ = Counts(), random.Random(f"kill:{number}")
    for _ in range(3 * kills):
        if sent.total() == kills:
            break
        process = fork_weaver(log, "run", config, "--run-dir", run_dir, *force)
        assert process.pid is not None
        started = time.monotonic()
        process.join(random_.uniform(0, seconds))
        if not process.is_alive():
            # It came to its end before the moment: from the start again, with earlier moments.
            seconds = min(seconds, time.monotonic() - started)
            if not force:
                shutil.rmtree(run_dir)
            continue
        which = signal.SIGKILL if random_.random() < 0.8 else random_.choice(SIGNALS)
        os.kill(process.pid, which)
        process.join(60)
        sent[which.name] += 1
        if process.exitcode is None:
            return sent, f"run {number}: alive 60 s after {which.name}"
        said = log.read_text()
        if "Traceback" in said:
            return sent, f"run {number}: a traceback after {which.name}: {said[-500:]}"
    code = _run(log, config, run_dir, *force)
    if code != 0 or stage_digests(run_dir) != stage_digests(whole):
        return sent, f"run {number}: exit code {code}, {log.read_text()[-500:]}"
    left = [str(path) for path in run_dir.rglob("*.tmp")] + [str(p) for p in run_dir.glob(".*.new")]
    return sent, f"run {number}: left {left}" if left else "clean"


def _run(log: Path, config: Path, run_dir: Path, *more: str) -> int | None:
    process = fork_weaver(log, "run", config, "--run-dir", run_dir, *more)
    process.join(300)
    return process.exitcode


def document(
    inputs: dict[str, Counts], flips: Counts, sent: Counts, runs: list[str], minutes: float
) -> str:
    """The text of docs/reliability.md."""
    rows = [
        (kind, sum(found.values()), found["refused"], found["accepted"], _wrong(found))
        for kind, found in inputs.items()
    ]
    total = [sum(int(row[column]) for row in rows) for column in range(1, 5)]
    stops = [(name, count) for name, count in sorted(sent.items())]
    return f"""# Reliability

`make attack` makes this page: it attacks weaver on a Llama of four layers with random weights and
counts. Inputs and moments come from seeds, so that each can be repeated. This page is of a run of
{minutes:g} minutes.

## Malformed inputs

One file of a whole set is changed: values of other types and sizes, nesting, cut off and flipped
bytes. *Refused* is one error with its three lines, *accepted* means that the change did no harm to
the format (a comment, a value in its range). *Wrong* is any other exception, more than 10 seconds,
or more than 1 GB of memory.

{markdown_table(("file", "tried", "refused", "accepted", "wrong"), [*rows, ("all", *total)])}
## Corrupted artifacts

One bit of one output of a finished stage is flipped, then the outputs are checked as every later
stage checks what it reads.

{
        markdown_table(
            ("tried", "named and refused", "accepted or misnamed"),
            [(flips.total(), flips["refused"], flips["accepted"] + flips["misnamed"])],
        )
    }
## Kills and signals

Runs from calibrate to bench (`cmoe`, `weave`, `flap`) are stopped at random moments and started
again, the third of every three with `--force` over a finished run; the last start may end. *Clean*
means the digests of an undisturbed run, nothing left over, and no traceback.

{markdown_table(("signal", "sent"), stops)}
{
        markdown_table(
            ("runs", "clean", "wrong"),
            [(len(runs), runs.count("clean"), len(runs) - runs.count("clean"))],
        )
    }"""


def _wrong(found: Counts) -> int:
    return found.total() - found["refused"] - found["accepted"]


def main() -> int:
    """Attack for some minutes and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    started = time.monotonic()
    end = started + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="weaver-attack-") as name:
        folder = Path(name)
        model = tiny_model(folder / "model")
        inputs = malformed(model, INPUTS, started + 0.4 * (end - started))
        flips = corruptions(model, folder, 400)
        sent: Counts = Counts()
        runs: list[str] = []
        while time.monotonic() < end:
            counted, result = stopped(model, folder, len(runs), kills=12)
            sent += counted
            runs.append(result)
            if result != "clean":
                print(result, flush=True)
    arguments.out.write_text(document(inputs, flips, sent, runs, arguments.minutes))
    bad = sum(map(_wrong, inputs.values())) + flips.total() - flips["refused"]
    return int(bad > 0 or set(runs) != {"clean"})


if __name__ == "__main__":
    sys.exit(main())
