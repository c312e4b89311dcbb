"""``build-router``: router and compensation of every FFN."""

from __future__ import annotations

from dataclasses import asdict

import torch

from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.summaries import PositionError, RoutedFfn, RouterSummary
from weaver.config.sections import RouterConfig
from weaver.conversion.routing import (
    RoutedLayer,
    read_routed,
    resolve_router,
    routed_paths,
    solve_layer,
    write_routed,
)
from weaver.conversion.splitter import layer_generator
from weaver.evaluation.fidelity import module_fidelity
from weaver.evaluation.positions import error_by_position
from weaver.methods.registry import get_method
from weaver.methods.selection import routed_inputs
from weaver.models.moe import MoEFeedForward
from weaver.models.sites import Site
from weaver.rundir.inputs import ROUTER_FOLDER, Partition, open_partition
from weaver.rundir.stage_run import StageContext, StageRun

STAGE = "build-router"

# FFN inputs on which a new router is compared with the oracle, per layer.
FIDELITY_TOKENS = 512


def build_routers(context: StageContext, config: RouterConfig) -> StageManifest:
    """Write one ``Router`` per FFN with routed experts, and the FFNs' ``Compensation``.

    Args:
        context: run directory, seed, progress.
        config: kind of router; None is the one of the partition method's paper.

    Raises:
        WeaverError: no finished partition, or no such router.
    """
    partition = open_partition(
        context.folder("partition"),
        trust_remote_code=context.trust_remote_code,
        device=context.device,
    )
    spec = get_method(partition.manifest.request.config["method"])
    resolved = resolve_router(config, spec)
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
    if partition.propagated is not None and resolved != partition.propagated:
        context.say(
            "note: layers were split behind layers with another router section: "
            + _differences(partition.propagated, resolved)
        )
    run.begin()
    sites = partition.calibration.checkpoint.sites
    with context.progress(STAGE, len(sites)) as advance:
        for site in sites:
            layout = partition.layout(site.number)
            paths = routed_paths(run.folder, site.number, layout, resolved)
            if not all(run.has_file(path) for path in paths):
                routed = _solve(partition, resolved, site.number, context)
                write_routed(run.folder, site.number, routed)
            advance(f"layer {site.layer}")
    return run.finish(_summary(run, partition, resolved))


def _differences(there: RouterConfig, here: RouterConfig) -> str:
    """The keys in which two router sections differ, with both values."""
    theirs, ours = there.model_dump(), here.model_dump()
    return "; ".join(
        f"{key}: {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]
    )


def _solve(
    partition: Partition, config: RouterConfig, site: int, context: StageContext
) -> RoutedLayer:
    layout = partition.layout(site)
    if config == partition.propagated and context.seed == partition.manifest.request.seed:
        return read_routed(partition.folder / ROUTER_FOLDER, site, layout)
    weights = partition.calibration.checkpoint.ffn(site, torch.float32)
    generator = layer_generator(context.seed, site)
    return solve_layer(weights, partition.profile(site), layout, config, generator)


def _summary(run: StageRun, partition: Partition, config: RouterConfig) -> RouterSummary:
    rows = (_routed_ffn(run, partition, site) for site in partition.calibration.checkpoint.sites)
    return RouterSummary(router=config.kind, layers=tuple(row for row in rows if row is not None))


def _routed_ffn(run: StageRun, partition: Partition, site: Site) -> RoutedFfn | None:
    """Fidelity and errors of one FFN; None if it is static."""
    layout = partition.layout(site.number)
    routed = read_routed(run.folder, site.number, layout)
    if routed.router is None:
        return None
    weights = partition.calibration.checkpoint.ffn(site.number, torch.float32)
    ffn = MoEFeedForward.convert(weights, layout, routed.router, routed.compensation)
    ffn = ffn.to(weights.device)
    profile = partition.profile(site.number)
    x_TD = routed_inputs(profile, layout.selection).ffn_inputs_ND[:FIDELITY_TOKENS].float()
    fidelity = asdict(module_fidelity(x_TD, ffn, weights))
    return RoutedFfn(
        layer=site.layer,
        part=site.part,
        **{key: round(value, 6) for key, value in fidelity.items()},
        errors=tuple(
            PositionError(first=first, last=last, error=round(error, 6))
            for first, last, error in error_by_position(profile, weights, ffn)
        ),
    )
