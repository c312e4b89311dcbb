"""``build-router``: a router for every layer that has routed experts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import Router
from weaver.config import RouterConfig
from weaver.evaluation.fidelity import router_fidelity
from weaver.methods.registry import get_method, get_router
from weaver.stages.finished import layer_path
from weaver.stages.parents import Partition, open_partition
from weaver.stages.partition import layer_generator
from weaver.stages.runner import StageContext, StageRun

STAGE = "build-router"

# FFN inputs on which a new router is compared with the oracle, per layer.
FIDELITY_TOKENS = 512


def build_routers(context: StageContext, config: RouterConfig) -> StageManifest:
    """Write one ``Router`` per layer with routed experts.

    Args:
        context: run directory, seed, progress.
        config: kind of router; None is the one of the partition method's paper.

    Raises:
        WeaverError: no finished partition, or no such router.
    """
    partition = open_partition(context.folder("partition"))
    resolved = resolve(config, partition)
    if resolved.kind is not None:
        get_router(resolved.kind)
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=resolved.model_dump(mode="json"),
        inputs={"partition": partition.ref},
    )
    run = StageRun(context, request, partition.calibration.identity, "float32")
    if run.status == "skip":
        return run.skipped()
    if config.kind is not None and resolved.kind is None:
        context.say(f"note: static layers route nothing, so router {config.kind!r} is not built")
    propagated = partition.manifest.request.config["propagate_router"]
    if partition.sequential and resolved.kind != propagated:
        context.say(
            f"note: layers were split behind layers routed by {propagated!r}, not {resolved.kind!r}"
        )
    run.begin()
    layers = partition.calibration.checkpoint.num_layers
    with context.progress(STAGE, layers) as advance:
        for layer in range(layers):
            if resolved.kind is not None and not run.has_layer(layer):
                write_record(run.layer_path(layer), _build(partition, resolved, layer, context))
            advance(f"layer {layer}")
    return run.finish(_summary(run, partition, resolved))


def resolve(config: RouterConfig, partition: Partition) -> RouterConfig:
    """The configuration with the partition method's own router filled in; None if static."""
    spec = get_method(partition.manifest.request.config["method"])
    return RouterConfig(kind=None if spec.is_static else config.kind or spec.router)


def _build(partition: Partition, config: RouterConfig, layer: int, context: StageContext) -> Router:
    assert config.kind is not None
    return get_router(config.kind).build(
        partition.calibration.checkpoint.ffn(layer, torch.float32),
        partition.profile(layer),
        partition.layout(layer),
        layer_generator(context.seed, layer),
    )


def _summary(run: StageRun, partition: Partition, config: RouterConfig) -> dict[str, Any]:
    if config.kind is None:
        return {"router": None, "layers": []}
    rows = []
    for layer in range(partition.calibration.checkpoint.num_layers):
        fidelity = router_fidelity(
            partition.profile(layer).ffn_inputs_ND[:FIDELITY_TOKENS].float(),
            partition.calibration.checkpoint.ffn(layer, torch.float32),
            partition.layout(layer),
            read_record(layer_path(run.folder, layer), Router),
        )
        rows.append({"layer": layer, **{k: round(v, 6) for k, v in asdict(fidelity).items()}})
    return {"router": config.kind, "layers": rows}
