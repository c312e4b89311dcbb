"""Seconds of the MoE FFN on this machine, measured once per kind of layer and kept in a file.

Which path is faster depends on the processor, the dtype, the sizes and the number of threads, and
no formula says it well. So a kind of layer (``LayerKind``) is timed when it is first met, at a few
numbers of tokens; what a call will cost is interpolated. The times are kept in a file, so that the
choice made from them, and with it every bit of the output, stays the same from run to run.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path as FilePath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from weaver.algorithms.glu import ACTIVATIONS, GluWeights
from weaver.artifacts.cache import cache_folder, cache_lock
from weaver.artifacts.header import parse_json
from weaver.artifacts.store import write_json
from weaver.artifacts.types import Router
from weaver.errors import WeaverError
from weaver.kernels.backends import Backend, Path, forwards
from weaver.kernels.cpu.build import compiled_kernel
from weaver.kernels.machine import cpu_name
from weaver.kernels.reference import ExpertChoice, MoELayer, Routing
from weaver.kernels.timing import interleave

# Tokens at which a kind of layer is timed; times in between are interpolated, beyond extrapolated.
TOKENS = (1, 4, 16, 64, 256)
REPEATS = 11

_log = logging.getLogger(__name__)


class LayerKind(NamedTuple):
    """Layers that cost the same: all that matters but the split into shared and routed neurons.

    Args:
        hidden_size: D.
        neurons: F', all neurons that are stored.
        width: N.
        dtype: of weights and inputs.
        device: type of the device.
        backend: which implementation computes.
        threads: of torch.
    """

    hidden_size: int
    neurons: int
    width: int
    dtype: torch.dtype
    device: str
    backend: Backend
    threads: int

    @property
    def file(self) -> FilePath:
        """File of its costs."""
        device = torch.cuda.get_device_name() if self.device == "cuda" else cpu_name()
        kernel = compiled_kernel().parent.name if self.backend == "native" else ""
        text = f"{self} {device} torch {torch.__version__} {kernel} {TOKENS} {REPEATS}"
        return cache_folder() / f"costs-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


class Workload(NamedTuple):
    """One call on one layer of a kind.

    Args:
        num_shared: S.
        num_experts: E; 0 for a dense FFN.
        num_tokens: T.
        num_pairs: P, selected pairs of token and expert; T K for top-k.
    """

    num_shared: int
    num_experts: int
    num_tokens: int
    num_pairs: int


@dataclass(frozen=True)
class Costs:
    """Measured seconds of a kind of layer at each of ``TOKENS``: the best of ``REPEATS`` runs.

    Other work on the machine makes a run longer, never shorter, and these times are kept: a median
    that was taken in a busy minute has predicted speed-ups that no machine could reach.

    Args:
        dense: the dense FFN as a model has it, with three ``torch.nn.functional.linear``.
        masked: all neurons, multiplied by their experts' factors.
        expert: one expert of N neurons for so many tokens, drawn from twice as many; its gathering
            and adding included.
        routing: scores and selection of a linear router with F' / N rows.
    """

    dense: tuple[float, ...]
    masked: tuple[float, ...]
    expert: tuple[float, ...]
    routing: tuple[float, ...]

    def seconds(self, work: Workload, kind: LayerKind, path: Path) -> float:
        """Predicted seconds of one call, the router left out.

        masked: ``t_masked(T)``. grouped: ``t_masked(T) S / F' + U t_expert(P / U)`` with
        ``U = min(E, P)`` experts used, each by as many tokens as the others.
        """
        masked = self.at(self.masked, work.num_tokens)
        if path == "masked":
            return masked
        used = min(work.num_experts, work.num_pairs)
        shared = masked * work.num_shared / kind.neurons
        return shared + (used * self.at(self.expert, work.num_pairs / used) if used else 0.0)

    def faster(self, work: Workload, kind: LayerKind) -> Path:
        """The path that is predicted to be faster."""
        grouped, masked = (self.seconds(work, kind, path) for path in ("grouped", "masked"))
        return "grouped" if grouped < masked else "masked"

    @staticmethod
    def at(seconds: tuple[float, ...], tokens: float) -> float:
        """Seconds at a number of tokens: linear in between, and beyond by the last two."""
        if tokens <= TOKENS[-1]:
            return float(np.interp(tokens, TOKENS, seconds))
        slope = (seconds[-1] - seconds[-2]) / (TOKENS[-1] - TOKENS[-2])
        return seconds[-1] + max(slope, 0.0) * (tokens - TOKENS[-1])


@cache
def costs_of(kind: LayerKind) -> Costs:
    """The costs of a kind of layer: read, or measured while other processes wait, and written.

    Where the cache cannot be written they hold for this process alone, and a warning says so.
    """
    try:
        with cache_lock("costs"):
            found = _read(kind.file)
            if found is None:
                found = measure(kind)
                write_json(kind.file, {"kind": str(kind), **asdict(found)})
            return found
    except (OSError, WeaverError) as error:
        _log.warning(
            "Measured costs cannot be kept (%s): other runs may choose other paths and differ in "
            "last bits. To keep them, set WEAVER_CACHE to a folder that can be written.",
            error,
        )
        return measure(kind)


def _read(file: FilePath) -> Costs | None:
    """Read the costs from a file; None if it is missing or damaged."""
    try:
        values = parse_json(file.read_bytes())
        return Costs(**{field.name: _seconds(values[field.name]) for field in fields(Costs)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _seconds(values: object) -> tuple[float, ...]:
    """One positive number for each of ``TOKENS``."""
    if not isinstance(values, list) or len(values) != len(TOKENS):
        raise ValueError("not one time for each number of tokens")
    if not all(isinstance(each, float) and 0 < each < math.inf for each in values):
        raise ValueError("a time is a positive number")
    return tuple(values)


@torch.no_grad()
def measure(kind: LayerKind) -> Costs:
    """Time a layer of a kind, filled with constants: times do not depend on values."""
    device, sizes = torch.device(kind.device), (kind.neurons, kind.hidden_size)
    matrix_FD = torch.full(sizes, 0.01, dtype=kind.dtype, device=device)
    gate_FD, up_FD, down_FD = matrix_FD, matrix_FD.clone(), matrix_FD.clone()
    down_DF = matrix_FD.t().contiguous()
    experts = kind.neurons // kind.width
    shared = kind.neurons - experts * kind.width
    layer = MoELayer(GluWeights(gate_FD, up_FD, down_FD, "silu"), shared)
    routed = MoELayer(layer.routed(), 0)
    half_of_them = ExpertChoice(max(1, experts // 2))
    router = Router(
        kind="linear",
        weight_ED=matrix_FD[:experts].clone(),
        scale_E=torch.zeros(experts, device=device),
        balance_bias_E=torch.zeros(experts, device=device),
    )
    chosen = forwards(kind.backend)
    seconds: dict[str, list[float]] = {"dense": [], "masked": [], "expert": [], "routing": []}
    for tokens in TOKENS:
        x_TD = torch.full((tokens, kind.hidden_size), 0.01, dtype=kind.dtype, device=device)
        twice_TD = torch.cat([x_TD, x_TD])
        every, half = (_routing(count, tokens, experts, device) for count in (tokens, 2 * tokens))

        def dense(x_TD: Tensor = x_TD) -> None:
            gate_TF = ACTIVATIONS["silu"](functional.linear(x_TD, gate_FD))
            functional.linear(gate_TF * functional.linear(x_TD, up_FD), down_DF)

        timings = interleave(
            {
                "dense": dense,
                "masked": partial(_call, chosen.masked, x_TD, layer, every),
                "expert": partial(_call, chosen.grouped, twice_TD, routed, half),
                "routing": partial(_call, chosen.route, x_TD, router, "silu", half_of_them),
            },
            repeats=REPEATS,
            warmup=1,
        )
        for name, timing in timings.items():
            seconds[name].append(timing.best / (experts if name == "expert" else 1))
    return Costs(**{name: tuple(values) for name, values in seconds.items()})


def _routing(tokens: int, chosen: int, experts: int, device: torch.device) -> Routing:
    """Every expert has ``chosen`` of the tokens, drawn evenly."""
    generator = torch.Generator().manual_seed(0)
    rank_ET = torch.rand(experts, tokens, generator=generator, device="cpu").argsort().argsort()
    tokens_P, experts_P = (chosen > rank_ET.T).nonzero(as_tuple=True)
    ones_P = torch.ones(len(tokens_P), device=device)
    return Routing(tokens_P.to(device), experts_P.to(device), ones_P, tokens, experts)


def _call(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)
