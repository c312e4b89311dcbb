"""``partition``: split every FFN into shared and routed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import ExpertLayout
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.errors import WeaverError
from weaver.methods.base import GroupOptions, MethodOptions, MethodSpec
from weaver.methods.registry import get_method, resolve_options
from weaver.models.accounting import LayerShape
from weaver.models.forecast import SPEED_TOKENS, predicted_speedup
from weaver.models.stream import DecoderStream
from weaver.stages.affinity import affinity_summary, mine_affinity, require_groups
from weaver.stages.budget import Budget, allocate
from weaver.stages.calibrate import read_packed_tokens
from weaver.stages.finished import layer_path
from weaver.stages.parents import PROFILE_FOLDER, ROUTER_FOLDER, open_calibration
from weaver.stages.profiling import Profiler, ResumableStream
from weaver.stages.routing import (
    read_routed,
    require_selection,
    resolve_router,
    routed_paths,
    write_routed,
)
from weaver.stages.runner import StageContext, StageRun
from weaver.stages.splitter import LayerSplitter

STAGE = "partition"


def partition(
    context: StageContext, config: PartitionConfig, calibration_folder: Path | None = None
) -> StageManifest:
    """Write one ``ExpertLayout`` per layer.

    One-shot, every layer is split by its profile on the dense model. Sequentially, layer l is
    profiled again on the output of the converted layers before it (CMoE, arXiv:2502.04416): the
    stage then streams the calibration tokens once more and keeps the new profiles beside the
    layouts.

    Args:
        context: run directory, seed, progress.
        config: method, sparsity, experts.
        calibration_folder: a calibrate folder of another run; default: this run's own.

    Raises:
        WeaverError: no finished calibration, unknown method or options, or a sparsity that the
            experts cannot express.
    """
    spec = get_method(config.method)
    options = resolve_options(spec, config.options)
    calibration = open_calibration(calibration_folder or context.folder("calibrate"))
    resolved = resolve(config, spec, options)
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=resolved.model_dump(mode="json"),
        inputs={"calibrate": calibration.ref},
    )
    run = StageRun(context, request, calibration.identity, calibration.manifest.dtype)
    if run.status == "skip":
        return run.skipped()
    splitter = LayerSplitter(calibration, resolved, spec, options, context.seed)
    if spec.prunes_groups:
        require_groups(calibration, spec.name, splitter.num_experts)
    run.begin()
    affinity = None
    if isinstance(options, GroupOptions):
        affinity = mine_affinity(context, run, splitter, options.affinity_windows)
        splitter.group_experts_G = affinity.experts_G
    budget = allocate(context, run.folder, splitter)
    split_all = _split_sequentially if resolved.sequential else _split_one_shot
    split_all(context, run, splitter, budget)
    summary = _summary(run, splitter, budget)
    if affinity is not None:
        summary["affinity"] = affinity_summary(affinity)
    return run.finish(summary)


def propagating(config: PartitionConfig, router: RouterConfig) -> PartitionConfig:
    """Sequential splits run behind layers that route as the converted model will."""
    return config if config.propagate else config.model_copy(update={"propagate": router})


def resolve(
    config: PartitionConfig, spec: MethodSpec[Any], options: MethodOptions
) -> PartitionConfig:
    """The configuration with the method's defaults filled in.

    Raises:
        WeaverError: no such router, it cannot select experts as the method's options want, or an
            allocation that the method does not have.
    """
    if spec.prunes_groups and (config.allocation or spec.allocation) != "uniform":
        raise WeaverError(
            f"{spec.name} with --allocation {config.allocation}",
            why="its experts are prunings of the whole FFN, of the same width in every layer",
            fix="--allocation uniform",
        )
    propagate = resolve_router(config.propagate or RouterConfig(), spec)
    if propagate.kind is not None:
        require_selection(propagate.kind, options.selects)
    _check_weighting(config, propagate, spec, options)
    return config.model_copy(
        update={
            "num_experts": None if spec.is_static else config.num_experts or spec.num_experts,
            "allocation": config.allocation or spec.allocation,
            "sequential": spec.sequential if config.sequential is None else config.sequential,
            "propagate": propagate,
            "options": options.model_dump(mode="json"),
        }
    )


def _check_weighting(
    config: PartitionConfig, router: RouterConfig, spec: MethodSpec[Any], options: MethodOptions
) -> None:
    if config.weighting is None:
        return
    if spec.is_static or spec.prunes_groups:
        raise WeaverError(
            f"partition.weighting={config.weighting} of {spec.name}",
            why="its experts are weighted in one way only" if spec.prunes_groups else "it has none",
            fix="leave partition.weighting out",
        )
    if config.weighting == "softmax" and options.selects != "top-k":
        raise WeaverError(
            "softmax weights of experts that are selected by a threshold",
            why="a threshold may select nothing, and the weights of nothing have no sum",
            fix="--set partition.options.selection=top-k",
        )
    if config.weighting == "softmax" and (router.refit or router.constants):
        raise WeaverError(
            "softmax weights with a refit or constants",
            why="both are solved for experts of weight 1",
            fix="--no-refit --set router.constants=false",
        )


def _split_one_shot(
    context: StageContext, run: StageRun, splitter: LayerSplitter, budget: Budget
) -> None:
    layers = splitter.checkpoint.num_layers
    with context.progress(STAGE, layers) as advance:
        for layer in range(layers):
            if not run.has_layer(layer):
                layout = splitter.split(
                    layer, splitter.calibration.profile(layer), budget.active_neurons[layer]
                )
                write_record(run.layer_path(layer), layout)
            advance(f"layer {layer}")


def _split_sequentially(
    context: StageContext, run: StageRun, splitter: LayerSplitter, budget: Budget
) -> None:
    calibration, checkpoint = splitter.calibration, splitter.checkpoint
    profiles, routers = run.folder / PROFILE_FOLDER, run.folder / ROUTER_FOLDER

    def finished_ffn(layer: int) -> nn.Module:
        layout = read_record(run.layer_path(layer), ExpertLayout)
        return splitter.converted_ffn(
            layer, layout, read_routed(routers, layer, layout), calibration.dtype
        )

    packed = read_packed_tokens(calibration.folder)
    decoder = DecoderStream(checkpoint, calibration.dtype, packed.input_ids_WT)
    stream = ResumableStream(decoder, run.folder, finished_ffn)
    profiler = Profiler(
        packed, calibration.config, calibration.dtype, calibration.manifest.request.seed
    )
    with context.progress(STAGE, checkpoint.num_layers) as advance:
        for layer in range(checkpoint.num_layers):
            if not _has_propagated(run, splitter, layer):
                stream.seek(layer)
                profile = profiler.observe(stream, checkpoint.ffn(layer, calibration.dtype))
                layout = splitter.split(layer, profile, budget.active_neurons[layer])
                routed = splitter.route(layer, layout, profile)
                write_record(layer_path(profiles, layer), profile)
                write_routed(routers, layer, routed)
                write_record(run.layer_path(layer), layout)
                stream.advance(splitter.converted_ffn(layer, layout, routed, calibration.dtype))
                stream.save()
            advance(f"layer {layer}")
    stream.discard()


def _has_propagated(run: StageRun, splitter: LayerSplitter, layer: int) -> bool:
    """Whether every file of a layer is there that a sequential split writes."""
    if not run.has_layer(layer):
        return False
    assert splitter.config.propagate is not None
    layout = read_record(run.layer_path(layer), ExpertLayout)
    paths = [
        layer_path(run.folder / PROFILE_FOLDER, layer),
        *routed_paths(run.folder / ROUTER_FOLDER, layer, layout, splitter.config.propagate),
    ]
    return all(run.has_file(path) for path in paths)


def _summary(run: StageRun, splitter: LayerSplitter, budget: Budget) -> dict[str, Any]:
    checkpoint = splitter.checkpoint
    sizes = (checkpoint.hidden_size, checkpoint.intermediate_size, checkpoint.dtype)
    rows = []
    for layer in range(checkpoint.num_layers):
        layout = read_record(run.layer_path(layer), ExpertLayout)
        shape = LayerShape(
            num_shared_neurons=layout.num_shared_neurons,
            n_routed_experts=layout.num_routed_experts,
            moe_intermediate_size=layout.expert_width,
            num_experts_per_tok=layout.top_k,
        )
        rows.append(
            {
                "layer": layer,
                "shared_neurons": layout.num_shared_neurons,
                "shared_share": round(layout.num_shared_neurons / layout.intermediate_size, 6),
                "experts": layout.num_routed_experts,
                "expert_width": layout.expert_width,
                "top_k": layout.top_k,
                "selection": layout.selection,
                "active_neurons": layout.active_neurons,
                "sparsity": round(layout.ffn_sparsity, 6),
                "predicted_speedups": {
                    str(tokens): round(predicted_speedup([shape], *sizes, tokens), 3)
                    for tokens in SPEED_TOKENS
                },
            }
        )
    summary: dict[str, Any] = {"method": splitter.spec.name, "scope": "ffn", "layers": rows}
    if budget.predicted_kl is not None:
        summary |= {"predicted_kl": budget.predicted_kl, "uniform_kl": budget.uniform_kl}
    return summary
