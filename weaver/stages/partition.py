"""``partition``: split every FFN into shared and routed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from weaver.algorithms.energy import centred_energy
from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import ExpertLayout, LayerProfile, Router
from weaver.config import PartitionConfig, RouterConfig
from weaver.methods.allocation import active_neurons, adaptive_active_neurons, plan_width
from weaver.methods.base import LayerProblem, MethodOptions, MethodSpec
from weaver.methods.registry import get_method, get_router, resolve_options
from weaver.models.moe import MoEFeedForward
from weaver.models.stream import DecoderStream
from weaver.stages.calibrate import read_packed_tokens
from weaver.stages.finished import layer_path
from weaver.stages.parents import PROFILE_FOLDER, Calibration, open_calibration
from weaver.stages.profiling import Profiler, ResumableStream
from weaver.stages.runner import StageContext, StageRun

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
    if resolved.propagate_router is not None:
        get_router(resolved.propagate_router)
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
    run.begin()
    split_all = _split_sequentially if resolved.sequential else _split_one_shot
    split_all(context, run, splitter)
    return run.finish(_summary(run, splitter))


def propagating(config: PartitionConfig, router: RouterConfig) -> PartitionConfig:
    """Sequential splits run behind layers that route as the converted model will."""
    if config.propagate_router is not None or router.kind is None:
        return config
    return config.model_copy(update={"propagate_router": router.kind})


def resolve(
    config: PartitionConfig, spec: MethodSpec[Any], options: MethodOptions
) -> PartitionConfig:
    """The configuration with the method's defaults filled in."""
    return config.model_copy(
        update={
            "num_experts": None if spec.is_static else config.num_experts or spec.num_experts,
            "sequential": spec.sequential if config.sequential is None else config.sequential,
            "propagate_router": None if spec.is_static else config.propagate_router or spec.router,
            "options": options.model_dump(mode="json"),
        }
    )


class LayerSplitter:
    """Poses each layer's problem to the method and builds the router that propagates it."""

    def __init__(
        self,
        calibration: Calibration,
        config: PartitionConfig,
        spec: MethodSpec[Any],
        options: MethodOptions,
        seed: int,
    ) -> None:
        self.calibration = calibration
        self.checkpoint = calibration.checkpoint
        self.config = config
        self.spec = spec
        self.options = options
        self.seed = seed
        neurons = self.checkpoint.intermediate_size
        self.width = (
            0
            if config.num_experts is None
            else plan_width(neurons, config.num_experts, config.expert_width_multiple)
        )
        self.active_neurons_L = self._allocate(neurons)

    def split(self, layer: int, profile: LayerProfile) -> ExpertLayout:
        """Layout of one layer."""
        problem = LayerProblem(
            layer=layer,
            weights=self.checkpoint.ffn(layer, torch.float32),
            profile=profile,
            active_neurons=self.active_neurons_L[layer],
            num_experts=self.config.num_experts or 0,
            expert_width=self.width,
        )
        layout: ExpertLayout = self.spec.partition(problem, self.options, self.generator(layer))
        return layout

    def converted_ffn(
        self, layer: int, layout: ExpertLayout, profile: LayerProfile
    ) -> MoEFeedForward:
        """The converted FFN that carries the hidden states past a layer."""
        weights = self.checkpoint.ffn(layer, torch.float32)
        router: Router | None = None
        if layout.num_routed_experts and self.config.propagate_router is not None:
            build = get_router(self.config.propagate_router).build
            router = build(weights, profile, layout, self.generator(layer))
        return MoEFeedForward.convert(weights.to(self.calibration.dtype), layout, router)

    def generator(self, layer: int) -> torch.Generator:
        """Randomness of one layer, the same whether or not the layers before it ran now."""
        return layer_generator(self.seed, layer)

    def _allocate(self, neurons: int) -> list[int]:
        layers = self.checkpoint.num_layers
        experts = self.config.num_experts or 0
        if self.config.allocation == "uniform":
            return [active_neurons(neurons, experts, self.width, self.config.sparsity)] * layers
        scores = [
            centred_energy(
                self.calibration.profile(layer).hidden_variance_F,
                self.checkpoint.ffn(layer, torch.float32).down_FD,
            )
            for layer in range(layers)
        ]
        return adaptive_active_neurons(scores, experts, self.width, self.config.sparsity)


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """A generator that depends on the seed and the layer only."""
    return torch.Generator().manual_seed(seed * 100_003 + layer)


def _split_one_shot(context: StageContext, run: StageRun, splitter: LayerSplitter) -> None:
    layers = splitter.checkpoint.num_layers
    with context.progress(STAGE, layers) as advance:
        for layer in range(layers):
            if not run.has_layer(layer):
                layout = splitter.split(layer, splitter.calibration.profile(layer))
                write_record(run.layer_path(layer), layout)
            advance(f"layer {layer}")


def _split_sequentially(context: StageContext, run: StageRun, splitter: LayerSplitter) -> None:
    calibration, checkpoint = splitter.calibration, splitter.checkpoint
    profiles = run.folder / PROFILE_FOLDER

    def finished_ffn(layer: int) -> nn.Module:
        layout = read_record(run.layer_path(layer), ExpertLayout)
        profile = read_record(layer_path(profiles, layer), LayerProfile)
        return splitter.converted_ffn(layer, layout, profile)

    packed = read_packed_tokens(calibration.folder)
    decoder = DecoderStream(checkpoint, calibration.dtype, packed.input_ids_WT)
    stream = ResumableStream(decoder, run.folder, finished_ffn)
    profiler = Profiler(
        packed, calibration.config, calibration.dtype, calibration.manifest.request.seed
    )
    with context.progress(STAGE, checkpoint.num_layers) as advance:
        for layer in range(checkpoint.num_layers):
            if not (run.has_layer(layer) and layer_path(profiles, layer).exists()):
                stream.seek(layer)
                profile = profiler.observe(stream, checkpoint.ffn(layer, calibration.dtype))
                write_record(layer_path(profiles, layer), profile)
                layout = splitter.split(layer, profile)
                write_record(run.layer_path(layer), layout)
                stream.advance(splitter.converted_ffn(layer, layout, profile))
                stream.save()
            advance(f"layer {layer}")
    stream.discard()


def _summary(run: StageRun, splitter: LayerSplitter) -> dict[str, Any]:
    rows = []
    for layer in range(splitter.checkpoint.num_layers):
        layout = read_record(run.layer_path(layer), ExpertLayout)
        rows.append(
            {
                "layer": layer,
                "shared_neurons": layout.num_shared_neurons,
                "shared_share": round(layout.num_shared_neurons / layout.intermediate_size, 6),
                "experts": layout.num_routed_experts,
                "expert_width": layout.expert_width,
                "top_k": layout.top_k,
                "active_neurons": layout.active_neurons,
                "sparsity": round(layout.ffn_sparsity, 6),
            }
        )
    return {"method": splitter.spec.name, "scope": "ffn", "layers": rows}
