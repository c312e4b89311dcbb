"""Benchmark of balanced clustering: time, peak memory and cost, next to scipy's exact solver.

Run with one thread:

    OMP_NUM_THREADS=1 python scripts/bench_balanced.py

It prints the tables and writes them to docs/balanced_clustering.md.
"""

from __future__ import annotations

import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weaver.algorithms.balanced import balanced_assignment, balanced_kmeans, within_cluster_cost

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "balanced_clustering.md"
ASSIGNMENT_SIZES = ((512, 8), (1024, 16), (2048, 64), (4096, 64))
KMEANS_SIZES = ((1536, 8, 240), (8960, 64, 240), (14336, 64, 240), (14336, 64, 4096))


@dataclass(frozen=True)
class Measurement:
    """Cost, CPU seconds and the growth of the process's peak memory of one computation."""

    cost: float
    seconds: float
    peak_mb: float


def profiles(points: int, dimensions: int) -> Tensor:
    """Uneven, overlapping groups: 64 directions of different strength and noise, (F, M)."""
    generator = torch.Generator().manual_seed(0)
    direction_GM = torch.randn(64, dimensions, generator=generator)
    strength_G1 = torch.rand(64, 1, generator=generator)
    group_F = (64 * torch.rand(points, generator=generator).square()).long()
    noise_FM = 0.7 * torch.randn(points, dimensions, generator=generator)
    return noise_FM + (strength_G1 * direction_GM)[group_F]


def costs(points: int, clusters: int) -> Tensor:
    """Squared distances to some of the points, less the smallest of each row, (F, E)."""
    points_FM = profiles(points, 64).double()
    cost_FE = torch.cdist(points_FM, points_FM[:clusters]).square()
    return cost_FE - cost_FE.amin(1, keepdim=True)


def measured(compute: Callable[[], float]) -> Measurement:
    """Run a computation that returns a cost (Linux only, for the memory)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is used now
    before = peak_kilobytes()
    start = time.process_time()
    cost = compute()
    seconds = time.process_time() - start
    return Measurement(cost, seconds, (peak_kilobytes() - before) / 1024)


def peak_kilobytes() -> int:
    """Peak resident memory since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def measure_assignment(points: int, clusters: int) -> Measurement:
    cost_FE = costs(points, clusters)

    def compute() -> float:
        owner_F = balanced_assignment(cost_FE, points // clusters)
        return float(cost_FE.gather(1, owner_F[:, None]).sum())

    return measured(compute)


def measure_scipy(points: int, clusters: int) -> Measurement:
    cost_FE = costs(points, clusters).numpy()

    def compute() -> float:
        expanded_FF = np.repeat(cost_FE, points // clusters, axis=1)
        rows, columns = linear_sum_assignment(expanded_FF)
        return float(expanded_FF[rows, columns].sum())

    return measured(compute)


def measure_kmeans(points: int, clusters: int, dimensions: int) -> Measurement:
    points_FM = profiles(points, dimensions)

    def compute() -> float:
        generator = torch.Generator().manual_seed(0)
        owner_F, centroids_EM = balanced_kmeans(points_FM, clusters, generator)
        return within_cluster_cost(points_FM, owner_F, centroids_EM)

    return measured(compute)


def in_fresh_process(measure: Callable[..., Measurement], *arguments: int) -> Measurement:
    """Measure in a process of its own: peak memory never falls again within one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def assignment_table() -> list[str]:
    lines = [
        "| F | E | weaver s | weaver MB | weaver cost | scipy s | scipy MB | scipy cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for points, clusters in ASSIGNMENT_SIZES:
        ours = in_fresh_process(measure_assignment, points, clusters)
        scipys = in_fresh_process(measure_scipy, points, clusters)
        lines.append(
            f"| {points} | {clusters} | {ours.seconds:.2f} | {ours.peak_mb:.0f} | {ours.cost:.6f} "
            f"| {scipys.seconds:.2f} | {scipys.peak_mb:.0f} | {scipys.cost:.6f} |"
        )
    largest = (14336, 64)
    ours = in_fresh_process(measure_assignment, *largest)
    expanded_gb = largest[0] ** 2 * 8 / 1e9
    lines.append(
        f"| {largest[0]} | {largest[1]} | {ours.seconds:.2f} | {ours.peak_mb:.0f} "
        f"| {ours.cost:.6f} | not run | {expanded_gb * 1e3:.0f} (the matrix) | |"
    )
    return lines


def kmeans_table() -> list[str]:
    lines = ["| F | E | M | seconds | MB | cost |", "|---|---|---|---|---|---|"]
    for size in KMEANS_SIZES:
        row = in_fresh_process(measure_kmeans, *size)
        cells = (*size, f"{row.seconds:.2f}", f"{row.peak_mb:.0f}", f"{row.cost:.6g}")
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def report() -> str:
    """The whole document."""
    versions = f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}"
    parts = [
        "# Balanced clustering",
        "",
        f"Made by `scripts/bench_balanced.py`: {torch.get_num_threads()} thread(s), {versions}.",
        "Seconds are CPU seconds, MB is the growth of the peak memory during the computation.",
        "",
        "## Balanced assignment next to `scipy.optimize.linear_sum_assignment`",
        "",
        "Both are exact, so the costs agree. scipy works on the expanded F x F matrix; weaver's",
        "memory is linear in F * E (`weaver/algorithms/transport.py`).",
        "",
        *assignment_table(),
        "",
        "## Balanced k-means of one layer, seeding to last iteration",
        "",
        "M is the length of a point: 240 calibration samples, or a hidden size of 4096.",
        "",
        *kmeans_table(),
        "",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    text = report()
    print(text)
    OUTPUT.write_text(text)
