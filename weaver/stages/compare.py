"""``compare``: several runs side by side, from what eval and bench wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weaver.artifacts.bench_results import BenchResult
from weaver.artifacts.compared_runs import ComparedRun, ComparedTask, Interval
from weaver.artifacts.manifest import MANIFEST, StageManifest
from weaver.artifacts.results import EvalResult, ModelQuality, TaskScore
from weaver.artifacts.summaries import PartitionSummary, read_summary
from weaver.evaluation.bootstrap import bootstrap_interval, paired_bootstrap
from weaver.evaluation.harness import PREFIX
from weaver.report.comparison import task_scores
from weaver.rundir.converted_model import model_folder_of
from weaver.rundir.measurements import read_bench, read_eval
from weaver.rundir.stage_folders import STAGE_FOLDERS, finished_stage


@dataclass(frozen=True)
class _Measured:
    """A run with what was measured of it."""

    run_dir: Path
    manifest: StageManifest
    result: EvalResult
    bench: BenchResult | None


def compare_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """Compare runs with their dense models, and with the first of them.

    Args:
        run_dirs: with a finished ``eval``; a finished ``bench`` adds speeds. They need not be of
            one model, nor measured on one text: what cannot be paired has no difference.

    Raises:
        WeaverError: a directory holds no finished ``eval``, or a damaged one.
    """
    runs = [_read(run_dir) for run_dir in run_dirs]
    return [_compared(run, None if run is runs[0] else runs[0]) for run in runs]


def _read(run_dir: Path) -> _Measured:
    manifest, _ = finished_stage(run_dir / STAGE_FOLDERS["eval"], "eval")
    bench = None
    if (run_dir / STAGE_FOLDERS["bench"] / MANIFEST).exists():
        finished_stage(run_dir / STAGE_FOLDERS["bench"], "bench")
        bench = read_bench(run_dir)
    return _Measured(run_dir, manifest, read_eval(run_dir), bench)


def _compared(run: _Measured, first: _Measured | None) -> ComparedRun:
    result, finetuned = run.result, "finetune" in run.manifest.request.inputs
    partition, _ = finished_stage(run.run_dir / STAGE_FOLDERS["partition"], "partition")
    bench = run.bench
    return ComparedRun(
        run=str(run.run_dir),
        model=run.manifest.model.path,
        method=read_summary(PartitionSummary, partition.summary).method,
        finetuned=finetuned,
        ffn_sparsity=result.ffn_sparsity,
        ffn_flops=result.measured_ffn_flops_per_token / result.dense.ffn_flops_per_token,
        kl=_interval(bootstrap_interval(result.windows.kl, _generator())),
        kl_difference=_kl_difference(result, first),
        perplexity=result.moe.perplexity,
        dense_perplexity=result.dense.perplexity,
        nll_increase=_interval(
            paired_bootstrap(result.windows.moe_nll, result.windows.dense_nll, _generator())
        ),
        top1_agreement=result.top1_agreement,
        tasks=_tasks(result, first),
        active_parameters=result.active_parameters,
        total_parameters=result.total_parameters,
        model_bytes=_bytes(model_folder_of(run.run_dir, finetuned=finetuned)),
        speedups={f"{r.phase} of {r.tokens}": r.speedup for r in bench.rows} if bench else {},
        device=f"{bench.header.device}, {bench.header.threads} threads" if bench else None,
    )


def _kl_difference(result: EvalResult, first: _Measured | None) -> Interval | None:
    if first is None or result.digests["data"] != first.result.digests["data"]:
        return None
    pair = (result.windows.kl, first.result.windows.kl)
    return _interval(paired_bootstrap(*pair, _generator()))


def _tasks(result: EvalResult, first: _Measured | None) -> dict[str, ComparedTask]:
    return {
        score.label: ComparedTask(
            score=score,
            from_dense=_paired(*(_hits(each, score) for each in (result.moe, result.dense))),
            difference=_difference(score, result, first),
        )
        for score in task_scores(result.dense.tasks, result.moe.tasks)
    }


def _difference(score: TaskScore, result: EvalResult, first: _Measured | None) -> Interval | None:
    """Difference of the hits behind a score; None where they are not of the same items."""
    if first is None or score.task not in first.result.moe.tasks:
        return None
    key = "harness" if score.task.startswith(PREFIX) else f"task {score.task}"
    if (
        result.digests.get(key) != first.result.digests.get(key)
        or result.moe.tasks[score.task].shots != first.result.moe.tasks[score.task].shots
    ):
        return None
    return _paired(*(_hits(each.moe, score) for each in (result, first.result)))


def _hits(model: ModelQuality, score: TaskScore) -> Sequence[int]:
    return model.tasks[score.task].correct.get(score.metric, ())


def _paired(ours: Sequence[int], theirs: Sequence[int]) -> Interval | None:
    if not ours or len(ours) != len(theirs):
        return None
    return _interval(paired_bootstrap(ours, theirs, _generator()))


def _interval(values: tuple[float, float, float]) -> Interval:
    mean, low, high = values
    return Interval(mean=mean, low=low, high=high)


def _generator() -> torch.Generator:
    """Equal draws for every interval: what is compared is resampled alike."""
    return torch.Generator().manual_seed(0)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
