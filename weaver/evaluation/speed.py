"""Speed of a dense model against its converted one: equal work, medians of interleaved runs.

Whoever measures decides threads, dtype and device, and puts the models into eval mode; nothing
here changes them. ``device_header`` writes down where the times were taken.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weaver.artifacts.bench_results import BenchHeader, BenchLevel, BenchRouting, BenchRow
from weaver.artifacts.dtypes import dtype_name
from weaver.kernels.machine import cpu_mhz, cpu_name
from weaver.kernels.timing import Timing, interleave


@torch.inference_mode()
def measure_prefill(
    models: Mapping[str, nn.Module],
    ids_1T: Tensor,
    *,
    bound: float,
    repeats: int,
    warmup: int,
    seconds: float = math.inf,
) -> BenchRow:
    """Time one forward over a prompt with an empty cache, as ``generate`` begins.

    Logits are computed for the last position alone (``logits_to_keep=1``), so the time is also the
    time to the first token; a bound made from FLOPs counts the head once per prompt.

    Args:
        models: ``{"dense": ..., "moe": ...}``, HF causal language models on one device.
        ids_1T: the prompt, int64, (1, T); real text, since routing depends on it.
        bound: ceiling of the speed-up for the whole model.
        repeats: timed rounds.
        warmup: rounds not counted.
        seconds: budget, after which no round begins; one is always timed.

    Raises:
        ValueError: ``models`` has other keys, or the prompt is not (1, T).
    """
    runs = _generations(models, ids_1T)
    timings = interleave(
        {name: run.first_token for name, run in runs.items()},
        repeats=repeats,
        warmup=warmup,
        seconds=seconds,
    )
    return bench_row(
        timings["dense"],
        timings["moe"],
        phase="prefill",
        tokens=ids_1T.shape[1],
        bound=bound,
    )


@torch.inference_mode()
def measure_decode(
    models: Mapping[str, nn.Module],
    ids_1T: Tensor,
    new_tokens: int,
    *,
    bound: float,
    repeats: int,
    warmup: int,
    seconds: float = math.inf,
) -> BenchRow:
    """Time decoding with a KV cache at batch 1, after an untimed prefill of the prompt.

    Both models are fed the same ids, the dense model's greedy continuation, so that both read the
    same text and do equal work; each still computes its own argmax at every step.

    Args:
        models: ``{"dense": ..., "moe": ...}``, HF causal language models on one device.
        ids_1T: the prompt, int64, (1, T).
        new_tokens: N, tokens fed one by one; the times of the row are for all N.
        bound: ceiling of the speed-up for the whole model.
        repeats: timed rounds.
        warmup: rounds not counted.
        seconds: budget, after which no round begins; one is always timed.

    Raises:
        ValueError: ``models`` has other keys, the prompt is not (1, T), or N is below 1.
    """
    runs = _generations(models, ids_1T)
    fed_1N = runs["dense"].greedy(new_tokens)
    timings = interleave(
        {name: run.decoder(fed_1N) for name, run in runs.items()},
        repeats=repeats,
        warmup=warmup,
        seconds=seconds,
        prepare={name: run.first_token for name, run in runs.items()},
    )
    return bench_row(
        timings["dense"], timings["moe"], phase="decode", tokens=new_tokens, bound=bound
    )


def device_header(
    dtype: torch.dtype,
    device: torch.device | None = None,
    level: BenchLevel = "model",
    routing: BenchRouting = "real",
) -> BenchHeader:
    """Header of a measurement: processor or GPU, torch's threads, dtype, versions.

    Args:
        dtype: dtype of the models.
        device: device of the models; None for the CPU.
        level: what is timed.
        routing: where routing comes from.
    """
    is_gpu = device is not None and device.type == "cuda"
    return BenchHeader(
        device=torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        threads=torch.get_num_threads(),
        dtype=dtype_name(dtype),
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")},
        },
        level=level,
        routing=routing,
        clock_mhz=None if is_gpu else cpu_mhz(),
    )


class _Generation:
    """One model, one prompt, and the cache that a prefill leaves."""

    def __init__(self, model: nn.Module, ids_1T: Tensor) -> None:
        self._model = model
        self._ids_1T = ids_1T
        self._cache: Any = None

    def first_token(self) -> None:
        self._cache = None
        self._step(self._ids_1T)

    def decoder(self, fed_1N: Tensor) -> Callable[[], None]:
        def decode() -> None:
            for id_11 in fed_1N.split(1, dim=1):
                self._step(id_11)

        return decode

    def greedy(self, new_tokens: int) -> Tensor:
        """The ids of a greedy continuation, (1, N)."""
        if new_tokens < 1:
            raise ValueError(f"new_tokens={new_tokens} must be positive")
        self._cache = None
        ids = [self._step(self._ids_1T)]
        while len(ids) < new_tokens:
            ids.append(self._step(ids[-1]))
        return torch.cat(ids, dim=1)

    def _step(self, ids_1T: Tensor) -> Tensor:
        """Feed ids behind the cache; the model makes the cache when there is none."""
        output = self._model(
            input_ids=ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        next_11: Tensor = output.logits[:, -1:].argmax(dim=-1)
        return next_11


def _generations(models: Mapping[str, nn.Module], ids_1T: Tensor) -> dict[str, _Generation]:
    if set(models) != {"dense", "moe"}:
        raise ValueError(f"models has the keys {sorted(models)}, not dense and moe")
    if ids_1T.ndim != 2 or ids_1T.shape[0] != 1 or ids_1T.shape[1] < 1:
        raise ValueError(f"prompt of shape {tuple(ids_1T.shape)}, not (1, T)")
    return {name: _Generation(models[name], ids_1T) for name in ("dense", "moe")}


def bench_row(
    dense: Timing,
    moe: Timing,
    *,
    phase: Literal["prefill", "decode"],
    tokens: int,
    bound: float,
    **more: Any,
) -> BenchRow:
    """Dense against converted from their timings; ``more`` are further fields of the row."""
    speedup = dense.ratio_to(moe)
    return BenchRow(
        tokens=tokens,
        phase=phase,
        dense_ms=1e3 * dense.median,
        dense_p10_ms=1e3 * dense.p10,
        dense_p90_ms=1e3 * dense.p90,
        moe_ms=1e3 * moe.median,
        moe_p10_ms=1e3 * moe.p10,
        moe_p90_ms=1e3 * moe.p90,
        speedup=speedup,
        bound=bound,
        bound_share=speedup / bound,
        dense_tokens_per_second=tokens / dense.median,
        moe_tokens_per_second=tokens / moe.median,
        **more,
    )
