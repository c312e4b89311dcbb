"""How long stages will take: from the same stages of finished runs, scaled by their work.

A stage's work is the weights of the dense FFNs times the tokens that they see, with what it does
beside tokens counted as tokens; seconds grow with it on one machine. Finished stages are looked for
in the run directory and its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.manifest import MANIFEST, REQUEST, StageManifest, read_manifest
from weaver.artifacts.summaries import CalibrateSummary, read_summary
from weaver.config.finetuning import FinetuneConfig
from weaver.config.loading import RunConfig
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.stage_folders import STAGE_FOLDERS
from weaver.training.presets import resolve_phases

# A layer's clustering and solving takes as long as this many of its tokens.
SPLIT_TOKENS = 8192
# Reading the weights once takes as long as computing this many tokens.
READ_TOKENS = 32
# Loading both models takes as long as comparing them on this many tokens.
LOAD_TOKENS = 1024
# An item of a task is about this long.
ITEM_TOKENS = 100


@dataclass(frozen=True)
class ExpectedTime:
    """Seconds of a stage, and the run that they were scaled from."""

    seconds: float
    source: str


@dataclass(frozen=True)
class _Work:
    """Kind, dtype and amount of a stage's computation, which decide its time.

    Args:
        kind: the method of a partition; "" of other stages.
        dtype: of the computation.
        units: FFN weights times tokens.
    """

    kind: str
    dtype: str
    units: float


@dataclass(frozen=True)
class _Finished:
    """A stage that finished: its run directory, its work and its seconds."""

    run: str
    work: _Work
    seconds: float


def expected_times(
    config: RunConfig, checkpoint: Checkpoint, run_dir: Path
) -> dict[str, ExpectedTime]:
    """Seconds of every stage of a run, as far as anything is known about it.

    Args:
        config: of the run.
        checkpoint: the dense model.
        run_dir: finished stages are looked for in it and in its neighbours.
    """
    weights = 3 * checkpoint.num_layers * checkpoint.hidden_size * checkpoint.intermediate_size
    dtypes = {"eval": config.eval.dtype, "bench": config.bench.dtype}
    found: dict[str, ExpectedTime] = {}
    for stage in STAGE_FOLDERS:
        section = getattr(config, {"build-router": "router"}.get(stage, stage))
        if section is None:
            continue
        asked = section.model_dump(mode="json")
        if isinstance(section, FinetuneConfig):
            asked = {"phases": [phase.model_dump() for phase in resolve_phases(section)]}
        wanted = _Work(
            kind=config.partition.method if stage == "partition" else "",
            dtype=dtype_name(checkpoint.resolve_dtype(dtypes.get(stage, config.model.dtype))),
            units=weights * _tokens(stage, asked, config.calibrate.tokens),
        )
        time = _scaled(stage, wanted, run_dir) if wanted.units else None
        if time is not None:
            found[stage] = time
    if "bench" in found and found["bench"].seconds > config.bench.seconds:
        # After its budget no round begins.
        found["bench"] = replace(found["bench"], seconds=config.bench.seconds)
    return found


def _scaled(stage: str, wanted: _Work, run_dir: Path) -> ExpectedTime | None:
    """Seconds by the finished stage whose work is nearest, of the same kind and dtype if any is."""

    def distance(known: _Finished) -> tuple[bool, bool, float]:
        ratio = math.log(known.work.units / wanted.units)
        return known.work.kind != wanted.kind, known.work.dtype != wanted.dtype, abs(ratio)

    known = min(_finished(stage, run_dir), key=distance, default=None)
    if known is None:
        return None
    return ExpectedTime(known.seconds * wanted.units / known.work.units, known.run)


def _finished(stage: str, run_dir: Path) -> Iterator[_Finished]:
    for path in sorted(run_dir.resolve().parent.glob(f"*/{STAGE_FOLDERS[stage]}/{MANIFEST}")):
        try:
            manifest = read_manifest(path.parent, rebuild="")
            shape = _calibration(path.parents[1])
        except WeaverError:
            continue
        # The seconds of a stage that was resumed are those of its last part.
        begun = (path.parent / REQUEST).stat().st_mtime
        ended = datetime.fromisoformat(manifest.finished_at).timestamp()
        if ended - begun > manifest.seconds + 1:
            continue
        asked = manifest.request.config
        weights = 3 * shape.num_layers * shape.hidden_size * shape.intermediate_size
        kind = asked["method"] if stage == "partition" else ""
        units = weights * _tokens(stage, asked, shape.tokens)
        if units:
            work = _Work(kind, manifest.dtype, units)
            yield _Finished(str(path.parents[1]), work, manifest.seconds)


def _calibration(run_dir: Path) -> CalibrateSummary:
    """The calibration that a run is made from, its own or another run's."""
    folder = run_dir / STAGE_FOLDERS["calibrate"]
    if not (folder / MANIFEST).exists():
        partition: StageManifest = read_manifest(run_dir / STAGE_FOLDERS["partition"], rebuild="")
        folder = run_dir / partition.request.inputs["calibrate"].path
    return read_summary(CalibrateSummary, read_manifest(folder, rebuild="").summary)


def _tokens(stage: str, asked: Mapping[str, Any], calibrated: int) -> float:
    """Tokens that a stage's time is proportional to, for its section of the configuration.

    0 where they are not known before the text is read.
    """
    tokens = float(calibrated)
    if stage == "calibrate":
        # Forward and backward, of some tokens, beside the profile of all.
        tokens = asked["tokens"] + 2 * min(asked["sensitivity_tokens"], asked["tokens"])
    elif stage == "partition":
        tokens = calibrated + SPLIT_TOKENS
    elif stage == "assemble":
        # The smoke test reads the same few tokens whatever the calibration was.
        tokens = 1
    elif stage == "finetune":
        phases = asked["phases"]
        tokens = sum(p["steps"] * p["batch_size"] * p["sequence_length"] for p in phases)
    elif stage == "eval":
        # Null asks for all windows or items, whose number only the text says.
        items = sum(asked["task_limit"] or math.nan for _ in asked["tasks"])
        text = (asked["windows"] or math.nan) * asked["sequence_length"]
        tokens = LOAD_TOKENS + text + items * ITEM_TOKENS
    elif stage == "bench":
        forwards = sum(tokens + READ_TOKENS for tokens in asked["tokens"])
        decoded = asked["decode_tokens"] * (1 + READ_TOKENS)
        tokens = (forwards + decoded) * (asked["repeats"] + asked["warmup"])
    return 0 if math.isnan(tokens) else tokens
