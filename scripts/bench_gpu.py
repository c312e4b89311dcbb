"""Check the routed experts on a GPU, then time them against dense and other MoE implementations.

First outputs and gradients against float64, and replays of a CUDA graph against eager runs; any
failure ends the program. Then the whole FFN, shared expert included, for random weights and uniform
random top-k routing. Everything runs in turn in one process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weaver.algorithms.glu import GluWeights
from weaver.evaluation.baselines import transformers_forward
from weaver.evaluation.speed import device_header
from weaver.kernels.gpu.op import routed_forward
from weaver.kernels.reference import MoELayer, Routing, masked_forward
from weaver.kernels.timing import interleave
from weaver.report.tables import format_ratio, format_seconds, markdown_table

TOKENS = (1, 16, 128, 512, 2048)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Layer:
    """D, shared neurons S, experts E of N neurons, K of them per token."""

    name: str
    hidden: int
    shared: int
    experts: int
    width: int
    top_k: int


LAYERS = (
    Layer("Llama-3-8B, 25%, 8 slices", 4096, 3584, 6, 1792, 4),
    Layer("Llama-3-8B, 50%, 8 slices", 4096, 1792, 7, 1792, 3),
    Layer("Llama-3-8B, 25%, 64 slices", 4096, 5376, 40, 224, 24),
    Layer("Qwen2.5-1.5B, 25%, 8 slices", 1536, 2240, 6, 1120, 4),
    Layer("SmolLM2-135M, 25%, 8 slices", 576, 384, 6, 192, 4),
)


@dataclass(frozen=True)
class Problem:
    """One layer's stored weights, inputs and routing."""

    layer: Layer
    x_TD: Tensor
    gate_FD: Tensor
    up_FD: Tensor
    down_FD: Tensor
    ids_TK: Tensor
    factors_TK: Tensor

    def by_expert(self, stored_FD: Tensor) -> Tensor:
        """The routed rows as (E, N, D)."""
        return stored_FD[self.layer.shared :].view(self.layer.experts, self.layer.width, -1)


def make_problem(layer: Layer, tokens: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Weights with outputs of about unit size; uniform random routing without repetition."""
    generator = torch.Generator(device).manual_seed(0)
    neurons = layer.shared + layer.experts * layer.width

    def normal(rows: int, scale: float) -> Tensor:
        values = torch.randn(rows, layer.hidden, generator=generator, device=device)
        return (scale * values).to(dtype)

    x_TD, gate_FD = normal(tokens, 1.0), normal(neurons, 2 * layer.hidden**-0.5)
    up_FD, down_FD = normal(neurons, layer.hidden**-0.5), normal(neurons, neurons**-0.5)
    scores_TE = torch.rand(tokens, layer.experts, generator=generator, device=device)
    ids_TK = scores_TE.topk(layer.top_k).indices
    factors_TK = 0.5 + scores_TE.gather(1, ids_TK)
    return Problem(layer, x_TD, gate_FD, up_FD, down_FD, ids_TK, factors_TK)


def ffn(problem: Problem, rows: slice) -> Tensor:
    """Some of the neurons as a dense FFN: three products by cuBLAS."""
    stored = (problem.gate_FD, problem.up_FD, problem.down_FD)
    gate_FD, up_FD, down_FD = (stored_FD[rows] for stored_FD in stored)
    gate_TF, up_TF = (
        functional.linear(problem.x_TD, gate_FD),
        functional.linear(problem.x_TD, up_FD),
    )
    return torch.mm(functional.silu(gate_TF) * up_TF, down_FD)


def weaver_routed(problem: Problem) -> Tensor:
    stored = (problem.gate_FD, problem.up_FD, problem.down_FD)
    gate_RD, up_RD, down_RD = (stored_FD[problem.layer.shared :] for stored_FD in stored)
    routing = (problem.ids_TK, problem.factors_TK, problem.layer.experts)
    return routed_forward(problem.x_TD, gate_RD, up_RD, down_RD, *routing, "silu")


def grouped_mm_routed(problem: Problem) -> Tensor:
    """Sort, gather, three calls of torch's grouped GEMM, and a sum over a token's rows."""
    sorted_P, order_P = problem.ids_TK.flatten().sort(stable=True)
    ends = torch.arange(1, problem.layer.experts + 1, device=sorted_P.device)
    offsets = torch.searchsorted(sorted_P, ends).int()
    x_PD = problem.x_TD[order_P // problem.layer.top_k]
    multiply: Callable[..., Tensor] = partial(functional.grouped_mm, offs=offsets)
    gate_PN = multiply(x_PD, problem.by_expert(problem.gate_FD).mT)
    up_PN = multiply(x_PD, problem.by_expert(problem.up_FD).mT)
    out_PD = multiply(functional.silu(gate_PN) * up_PN, problem.by_expert(problem.down_FD))
    by_slot_PD = torch.empty_like(out_PD).index_copy_(0, order_P, out_PD)
    weighted_PD = by_slot_PD * problem.factors_TK.view(-1, 1)
    return torch.sum(weighted_PD.view(*problem.ids_TK.shape, -1), 1).to(out_PD.dtype)


def transformers_ffn(problem: Problem, which: str) -> Callable[[], Tensor]:
    """The whole FFN with the experts of transformers, on a copy of the weights in its layout."""
    layer = problem.layer
    weights = GluWeights(problem.gate_FD, problem.up_FD, problem.down_FD, "silu")
    forward = transformers_forward(MoELayer(weights, layer.shared), layer.experts, which)
    routing = Routing.of_top_k(problem.ids_TK, problem.factors_TK, layer.experts)
    return partial(forward, problem.x_TD, routing)


def methods(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Whole FFNs by name, all but ``dense`` with shared and routed part."""
    routed: dict[str, Callable[[], Tensor]] = {
        "weaver": partial(weaver_routed, problem),
        "grouped_mm": partial(grouped_mm_routed, problem),
    }
    whole = {"transformers grouped_mm": transformers_ffn(problem, "grouped_mm")}
    # It copies an expert's weights for every pair of token and expert.
    if problem.ids_TK.numel() * problem.layer.width * problem.layer.hidden <= 2**29:
        whole["transformers batched_mm"] = transformers_ffn(problem, "batched_mm")

    def with_shared(part: Callable[[], Tensor]) -> Tensor:
        return ffn(problem, slice(problem.layer.shared)) + part()

    dense = partial(ffn, problem, slice(None))
    return {
        "dense": dense,
        **{name: partial(with_shared, routed[name]) for name in routed},
        **whole,
    }


def captured(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The function as a replay of a CUDA graph, and the tensor that it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = function()
    return graph.replay, filled


def errors(problem: Problem) -> dict[str, float]:
    """Relative norm of the errors of the routed part and its gradients against float64."""
    named = ("x_TD", "gate_FD", "up_FD", "down_FD", "factors_TK")
    leaf = {name: getattr(problem, name).clone().requires_grad_() for name in named}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in leaf.items()}
    y_TD = weaver_routed(Problem(problem.layer, ids_TK=problem.ids_TK, **leaf))
    routing = Routing.of_top_k(problem.ids_TK, exact["factors_TK"], problem.layer.experts)
    gate_RD, up_RD, down_RD = (exact[name][problem.layer.shared :] for name in named[1:4])
    layer = MoELayer(GluWeights(gate_RD, up_RD, down_RD, "silu"), 0)
    truth_TD = masked_forward(exact["x_TD"], layer, routing)
    toward_TD = torch.randn_like(y_TD)
    found = torch.autograd.grad(y_TD, list(leaf.values()), toward_TD)
    expected = torch.autograd.grad(truth_TD, list(exact.values()), toward_TD.double())
    pairs = zip((y_TD.detach(), *found), (truth_TD.detach(), *expected), strict=True)
    relative = (float((ours - exactly).norm() / exactly.norm()) for ours, exactly in pairs)
    return dict(zip(("y", *named), relative, strict=True))


def check(problem: Problem) -> None:
    """Ends the program where a result is too far off, or a graph's is not the eager one."""
    case = f"{problem.layer.name}, {problem.x_TD.dtype}, T = {len(problem.x_TD)}"
    for name, error in errors(problem).items():
        # The negation also catches an error that is not a number.
        if not error < TOLERANCE[problem.x_TD.dtype]:
            raise SystemExit(f"{case}: relative error {error:.2g} of {name}")
    if problem.x_TD.is_cuda:
        replay, filled = captured(lambda: weaver_routed(problem))
        replay()
        if not torch.equal(filled, weaver_routed(problem)):
            raise SystemExit(f"{case}: a CUDA graph gives another result")


def measure(problem: Problem, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of every method: median, p10 and p90."""
    functions = methods(problem)
    for name in ("dense", "weaver") if problem.x_TD.is_cuda else ():
        functions[f"{name}, graph"] = captured(functions[name])[0]  # type: ignore[assignment]
    with torch.inference_mode():
        timings = interleave(functions, repeats=repeats, warmup=5)
    return {name: {"median": t.median, "p10": t.p10, "p90": t.p90} for name, t in timings.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per method; the last column compares it with dense in eager mode."""
    lines = []
    for row in rows:
        for name, timing in row["seconds"].items():
            gain = row["seconds"]["dense"]["median"] / timing["median"]
            said = format_ratio(gain) + ("" if gain >= 1 else ", slower than dense")
            times = (format_seconds(timing[key]) for key in ("median", "p10", "p90"))
            lines.append((row["layer"], row["tokens"], name, *times, said))
    columns = ["layer", "tokens", "method", "median", "p10", "p90", "against dense"]
    return markdown_table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_gpu.json"), metavar="JSON")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu: torch finds no CUDA or ROCm device; nothing was measured")
    device = torch.device("cuda", torch.cuda.current_device())
    for layer, dtype, tokens in product(LAYERS, TOLERANCE, (1, 3, 37, 300)):
        check(make_problem(layer, tokens, dtype, device))
    rows: list[dict[str, Any]] = []
    for layer, tokens in product(LAYERS, TOKENS):
        problem = make_problem(layer, tokens, torch.bfloat16, device)
        seconds = measure(problem, arguments.repeats)
        rows.append({"layer": layer.name, "tokens": tokens, "seconds": seconds})
    result = {"header": device_header(torch.bfloat16, device).model_dump(), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
