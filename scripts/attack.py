"""Attack weaver with malformed inputs, corruptions, kills and signals; write docs/reliability.md.

Bounded by ``--minutes``; every input and moment comes from a seed, so that what went wrong can be
repeated. Exits non-zero if anything did.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from attack_inputs import KINDS, attack
from attack_page import document
from attack_stops import STOCK, Counts, Round, finish, repeated, stopped, without_room
from byte_tokenizer import byte_tokenizer
from tiny_models import save_tiny_model

from weaver.artifacts.manifest import MANIFEST, read_manifest
from weaver.errors import WeaverError
from weaver.methods.registry import METHODS
from weaver.rundir.stage_folders import check_contents

DOCUMENT = Path("docs/reliability.md")
# Inputs, after which the rest of the time goes to commands; the share of it that they may take.
INPUTS, INPUTS_SHARE = 11_000, 0.5
FLIPS, KILLS = 500, 6
WORKERS = 2
# Rounds that are run without room too; the stock method's exports are among them.
ROOMS = range(list(METHODS).index(STOCK) + 1)


@dataclass
class Found:
    """Counts of one attack, and the cases that went wrong.

    Args:
        inputs: outcomes of malformed inputs by kind.
        flips: outcomes of flipped bits by folder of the artifact.
        sent: signals by "COMMAND SIGNAL".
        rooms: commands without room by "FORM OUTCOME".
        repeats: by method whether the digest of each stage is the same again, and with two threads.
        rounds: how many of them, by "METHOD: FORM".
        wrong: what went wrong, a sentence each.
    """

    inputs: dict[str, Counts] = field(default_factory=dict)
    flips: dict[str, Counts] = field(default_factory=dict)
    sent: Counts = field(default_factory=Counts)
    rooms: Counts = field(default_factory=Counts)
    repeats: dict[str, dict[str, tuple[bool, bool]]] = field(default_factory=dict)
    rounds: Counts = field(default_factory=Counts)
    wrong: list[str] = field(default_factory=list)

    def note(self, result: str) -> None:
        """Keep and print a result that is not "clean"."""
        if result != "clean":
            print(result, flush=True)
            self.wrong.append(result)

    def add(self, other: Found) -> None:
        """Take over what another worker found."""
        for mine, theirs in ((self.inputs, other.inputs), (self.flips, other.flips)):
            for kind, counts in theirs.items():
                mine[kind] = mine.get(kind, Counts()) + counts
        self.sent += other.sent
        self.rooms += other.rooms
        self.repeats |= other.repeats
        self.rounds += other.rounds
        self.wrong += other.wrong


def tiny_model(folder: Path) -> Path:
    """The model under attack: a Llama of four layers with random weights, for all to read."""
    sizes: dict[str, Any] = {"num_hidden_layers": 4, "intermediate_size": 64}
    save_tiny_model("llama", folder, byte_tokenizer(), max_position_embeddings=512, **sizes)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def malformed(model: Path, numbers: Iterable[int], deadline: float, found: Found) -> None:
    """Read malformed inputs, of every kind in turn, until time is up."""
    for number in numbers:
        kind = list(KINDS)[number % len(KINDS)]
        if time.monotonic() > deadline:
            break
        with tempfile.TemporaryDirectory() as folder:
            outcome = attack(kind, number, model, Path(folder))
        found.inputs.setdefault(kind, Counts())[outcome] += 1
        if outcome not in ("refused", "accepted"):
            found.note(f"{kind}, seed {number}: {outcome}")


def corruptions(run_dir: Path, flips: int, found: Found) -> None:
    """Flip one bit of an output at a time: what a later stage reads must be refused by name."""
    stages = sorted(path.parent for path in run_dir.glob(f"*/{MANIFEST}"))
    for number in range(flips):
        random_ = random.Random(f"flip:{number}")
        stage = stages[number % len(stages)]
        manifest = read_manifest(stage, rebuild="")
        path = stage / random_.choice(sorted(manifest.outputs))
        whole = path.read_bytes()
        content = bytearray(whole)
        content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        path.write_bytes(bytes(content))
        counts = found.flips.setdefault(stage.name, Counts())
        try:
            check_contents(stage, manifest)
            counts["accepted"] += 1
            found.note(f"{path.relative_to(run_dir)}, flip {number}: accepted")
        except WeaverError as error:
            counts["refused" if str(path) in error.what else "misnamed"] += 1
        path.write_bytes(whole)


def rounds(model: Path, folder: Path, worker: int, end: float, found: Found) -> None:
    """Stop commands round by round until time is up.

    The first round of every method is repeated too, and some are run without room.
    """
    number = worker
    while time.monotonic() < end:
        round_ = Round.make(number, model, folder / str(number))
        sent, result = stopped(round_, KILLS)
        found.sent += sent
        found.rounds[f"{round_.method}: {round_.form}"] += 1
        found.note(result)
        if result == "clean" and number < len(METHODS):
            found.repeats[round_.method] = repeated(round_)
        if result == "clean" and number in ROOMS:
            for form in ("full", "read-only"):
                counts, result = without_room(round_, form)
                found.rooms += counts
                found.note(result)
        number += WORKERS


def work(model: Path, folder: Path, worker: int, started: float, end: float) -> Found:
    """The part of one worker: its inputs, then its rounds."""
    found = Found()
    until = started + INPUTS_SHARE * (end - started)
    share = INPUTS // WORKERS
    malformed(model, range(worker * share, (worker + 1) * share), until, found)
    if worker == 0:
        round_ = Round.make(list(METHODS).index(STOCK), model, folder / "flips")
        finish(round_, round_.folder / "whole")
        corruptions(round_.folder / "whole", FLIPS, found)
    rounds(model, folder, worker, end, found)
    return found


def main() -> int:
    """Attack for some minutes and write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    started = time.monotonic()
    end = started + 60 * arguments.minutes
    found = Found()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="weaver-attack-") as name,
        ProcessPoolExecutor(WORKERS, mp_context=context) as pool,
    ):
        folder = Path(name)
        folder.chmod(0o755)
        model = tiny_model(folder / "model")
        parts = [pool.submit(work, model, folder, n, started, end) for n in range(WORKERS)]
        for part in parts:
            found.add(part.result())
    minutes = (time.monotonic() - started) / 60
    arguments.out.write_text(document(found, minutes))
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
