"""``bench``: the real speed of the converted model next to the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from weaver.artifacts.bench_results import BenchResult, BenchRow
from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.manifest import StageManifest, StageRequest, peak_memory_bytes
from weaver.artifacts.store import write_json, write_text
from weaver.config.sections import BenchConfig
from weaver.data.packing import read_windows
from weaver.evaluation.speed import device_header, measure_decode, measure_prefill
from weaver.report.plots import speedup_plot
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.measurements import RESULTS
from weaver.rundir.stage_run import StageContext, StageRun

STAGE = "bench"
PLOT = "speedup.svg"

# Tokens of the prompt in front of the decoded ones.
DECODE_PROMPT = 64


def bench(context: StageContext, config: BenchConfig, *, finetuned: bool = True) -> StageManifest:
    """Time prefill at several lengths and decoding, dense and converted in turn.

    The prompts are the held-out text of the package: routing, and with it the speed, depends on
    real text.

    Args:
        context: run directory, progress.
        config: lengths, repeats, threads.
        finetuned: time the fine-tuned model if the run has one.

    Raises:
        WeaverError: no finished conversion.
    """
    converted = open_converted(context, finetuned=finetuned)
    dtype = converted.dtype(config.dtype)
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=config.model_dump(mode="json"),
        inputs={converted.stage: converted.ref},
    )
    run = StageRun(context, request, converted.manifest.model, dtype_name(dtype))
    if run.status == "skip":
        return run.skipped()
    run.begin()
    with pinned_threads(config.threads):
        rows = _rows(context, config, converted)
        header = device_header(dtype, device=context.device).model_copy(
            update={"peak_memory_bytes": peak_memory_bytes()}
        )
    result = BenchResult(header=header, rows=rows)
    write_json(run.folder / RESULTS, result.flat_rows())
    write_text(run.folder / PLOT, speedup_plot(result))
    return run.finish(result)


def _rows(
    context: StageContext, config: BenchConfig, converted: ConvertedModel
) -> tuple[BenchRow, ...]:
    models = {"dense": converted.load_dense(config.dtype), "moe": converted.load(config.dtype)}
    bound = converted.account().speed_bound
    ids_T = prompt(converted, max((*config.tokens, DECODE_PROMPT)))
    count = len(config.tokens) + (config.decode_tokens > 0)
    rows = []

    def measured(measure: Callable[..., BenchRow], *arguments: Any) -> BenchRow:
        return measure(
            *arguments,
            bound=bound,
            repeats=config.repeats,
            warmup=config.warmup,
            seconds=config.seconds / count,
        )

    with context.progress(STAGE, count) as advance:
        for tokens in config.tokens:
            rows.append(measured(measure_prefill, models, ids_T[None, :tokens]))
            advance(f"prefill {tokens}")
        if config.decode_tokens:
            prompt_1T = ids_T[None, :DECODE_PROMPT]
            rows.append(measured(measure_decode, models, prompt_1T, config.decode_tokens))
            advance("decode")
    return tuple(rows)


def prompt(converted: ConvertedModel, tokens: int) -> Tensor:
    text, length = ["builtin:held-out"], max(tokens, 2)
    windows_WT = read_windows(text, converted.dense.tokenizer(), sequence_length=length, limit=1)
    return windows_WT[0].to(converted.device)


@contextmanager
def pinned_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
