"""``bench-layer``: single FFNs of a run, or of a size that is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weaver.artifacts.bench_results import BenchResult, BenchRouting, FfnLevel
from weaver.artifacts.dtypes import DTYPES
from weaver.artifacts.manifest import peak_memory_bytes
from weaver.config.sections import BenchConfig
from weaver.errors import WeaverError
from weaver.evaluation.layers import LayerCase, measure_layer, synthetic_case
from weaver.evaluation.speed import device_header
from weaver.methods.allocation import active_neurons
from weaver.models.accounting import LayerShape
from weaver.models.moe import MoEFeedForward
from weaver.rundir.converted_model import ConvertedModel, open_converted
from weaver.rundir.stage_run import StageContext
from weaver.stages.bench import pinned_threads, prompt

SHARED_SHARE = 0.25


@dataclass(frozen=True)
class LayerSize:
    """An FFN to time without a model.

    Args:
        hidden_size: D.
        intermediate_size: F.
        num_experts: Ne, slices of the FFN; a quarter of the active ones is shared.
        sparsity: wanted FFN sparsity.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    sparsity: float

    def shape(self) -> LayerShape:
        """Shape of the converted FFN.

        Raises:
            WeaverError: the experts cannot express the sparsity.
        """
        width, left = divmod(self.intermediate_size, self.num_experts)
        if left or self.num_experts < 2:
            raise WeaverError(
                f"{self.intermediate_size} neurons do not divide into {self.num_experts} slices",
                why="there are at least two slices, all of the same width",
                fix="--num-experts or --intermediate-size so that the one divides the other",
            )
        neurons = active_neurons(self.intermediate_size, self.num_experts, width, self.sparsity)
        active = neurons // width
        shared = round(active * SHARED_SHARE)
        return LayerShape(
            num_shared_neurons=shared * width,
            n_routed_experts=self.num_experts - shared,
            moe_intermediate_size=width,
            num_experts_per_tok=active - shared,
            router_kind="linear",
        )


def bench_size(
    context: StageContext,
    config: BenchConfig,
    size: LayerSize,
    level: FfnLevel,
    routing: BenchRouting,
) -> BenchResult:
    """Time an FFN of random weights on random inputs, at each of ``config.tokens``.

    Raises:
        WeaverError: real routing without a model, or the experts cannot express the sparsity.
    """
    if routing == "real":
        raise WeaverError(
            "there is no real routing for an FFN that is only a size",
            why="it is recorded from a converted model on text",
            fix="--routing uniform or skewed, or --run-dir RUN instead of --hidden-size",
        )
    dtype = torch.float32 if config.dtype == "auto" else DTYPES[config.dtype]
    shape, tokens = size.shape(), max(config.tokens)
    case = synthetic_case(
        shape, size.hidden_size, tokens, dtype, skewed=routing == "skewed", seed=context.seed
    )
    return _measure(context, config, [(None, case)], dtype, level, routing)


def bench_run(
    context: StageContext,
    config: BenchConfig,
    layers: Sequence[int],
    level: FfnLevel,
    routing: BenchRouting,
) -> BenchResult:
    """Time FFNs of a run's converted model against the dense model's.

    Args:
        context: run directory, seed.
        config: tokens, repeats, threads, dtype.
        layers: their indices; none for the one in the middle.
        level: with the router, or with the routing given.
        routing: inputs recorded from the converted model on held-out text, or random ones and a
            random router of the same shape.

    Raises:
        WeaverError: no finished conversion, no such layer, a layer without routed experts, or a
            model whose layers hold many FFNs.
    """
    converted = open_converted(context)
    if converted.dense.is_moe:
        raise WeaverError(
            "bench-layer of a model with two levels of experts",
            why="a layer is many FFNs there, each with tokens of its own",
            fix="weaver bench, or give a size with --hidden-size and --intermediate-size",
        )
    shapes, dtype = converted.shapes(), converted.dtype(config.dtype)
    chosen = list(layers) or [len(shapes) // 2]
    for layer in chosen:
        if not 0 <= layer < len(shapes) or not shapes[layer].n_routed_experts:
            raise WeaverError(
                f"layer {layer} has no routed experts",
                why=f"the model has layers 0 to {len(shapes) - 1}, and static ones have no experts",
                fix="--layer N with another layer",
            )
    if routing == "real":
        cases = list(_recorded(converted, config, chosen))
    else:
        hidden, tokens = converted.dense.hidden_size, max(config.tokens)
        skewed, seed = routing == "skewed", context.seed
        # Experts that overlap are stored with more neurons than the dense layer has.
        neurons = converted.dense.intermediate_size
        cases = [
            (
                layer,
                synthetic_case(
                    *(shapes[layer], hidden, tokens, dtype),
                    skewed=skewed,
                    seed=seed,
                    dense_neurons=neurons if shapes[layer].total_neurons > neurons else None,
                ),
            )
            for layer in chosen
        ]
    return _measure(context, config, cases, dtype, level, routing)


@torch.no_grad()
def _recorded(
    converted: ConvertedModel, config: BenchConfig, layers: Sequence[int]
) -> Iterator[tuple[int, LayerCase]]:
    """The converted FFNs with what reaches them on held-out text, beside the dense ones."""
    model = converted.load(config.dtype)
    modules = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    inputs: dict[int, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[modules.index(module)] = arguments[0][0].clone()  # type: ignore[arg-type]

    hooks = [modules[layer].register_forward_pre_hook(keep) for layer in layers]
    model(input_ids=prompt(converted, max(config.tokens))[None, : max(config.tokens)])
    # What is timed must not record.
    for hook in hooks:
        hook.remove()
    for layer in layers:
        dense = converted.dense.ffn(layer, converted.dtype(config.dtype))
        yield layer, LayerCase(dense, modules[layer], inputs[layer])


def _measure(
    context: StageContext,
    config: BenchConfig,
    cases: Sequence[tuple[int | None, LayerCase]],
    dtype: torch.dtype,
    level: FfnLevel,
    routing: BenchRouting,
) -> BenchResult:
    rows = []
    work = [(layer, case, tokens) for layer, case in cases for tokens in config.tokens]
    with pinned_threads(config.threads), context.progress(f"bench {level}", len(work)) as advance:
        for layer, case, tokens in work:
            row = measure_layer(
                *(case, tokens, level),
                repeats=config.repeats,
                warmup=config.warmup,
                seconds=config.seconds / len(work),
            )
            rows.append(row.model_copy(update={"layer": layer}))
            advance(f"{tokens} tokens")
        header = device_header(dtype, level=level, routing=routing)
    header = header.model_copy(update={"peak_memory_bytes": peak_memory_bytes()})
    return BenchResult(header=header, rows=tuple(rows))
