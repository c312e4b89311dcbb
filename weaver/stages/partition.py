"""``partition``: split every FFN into shared and routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.errors import WeaverError
from weaver.methods.base import GroupOptions, MethodOptions, MethodSpec
from weaver.methods.registry import get_method, resolve_options
from weaver.models.accounting import LayerShape
from weaver.models.forecast import SPEED_TOKENS, predicted_speedup
from weaver.models.sites import Site
from weaver.models.stream import DecoderStream, layer_ffns
from weaver.stages.affinity import affinity_summary, mine_affinity, require_groups
from weaver.stages.budget import Budget, allocate
from weaver.stages.calibrate import read_packed_tokens
from weaver.stages.finished import layer_path
from weaver.stages.parents import PROFILE_FOLDER, ROUTER_FOLDER, open_calibration
from weaver.stages.profiling import ExpertInputs, Profiler, ResumableStream
from weaver.stages.routing import (
    read_routed,
    require_selection,
    resolve_router,
    routed_paths,
    write_routed,
)
from weaver.stages.runner import StageContext, StageRun
from weaver.stages.splitter import MIN_EXPERT_TOKENS, LayerSplitter

STAGE = "partition"


def partition(
    context: StageContext, config: PartitionConfig, calibration_folder: Path | None = None
) -> StageManifest:
    """Write one ``ExpertLayout`` per FFN: per layer, or per expert of a MoE model.

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
        # Left out where it is off: earlier versions had none, and their partitions are the same.
        config=resolved.model_dump(
            mode="json", exclude={"weighting"} if resolved.weighting is None else None
        ),
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
    if spec.is_static and config.num_experts is not None:
        raise WeaverError(
            f"{spec.name} with {config.num_experts} experts",
            why="it is a static method: every token runs the same neurons, there are no experts",
            fix="leave --num-experts out, or choose a routed method such as weave",
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
    if options.selects != "top-k":
        raise WeaverError(
            "softmax weights of experts that are selected by a threshold",
            why="a threshold may select nothing, and the weights of nothing have no sum",
            fix="--set partition.options.selection=top-k",
        )
    if router.refit or router.constants:
        raise WeaverError(
            "softmax weights with a refit or constants",
            why="both are solved for experts of weight 1",
            fix="--no-refit --set router.constants=false",
        )


def _split_one_shot(
    context: StageContext, run: StageRun, splitter: LayerSplitter, budget: Budget
) -> None:
    sites = splitter.checkpoint.sites
    with context.progress(STAGE, len(sites)) as advance:
        for site in sites:
            if not run.has_layer(site.number):
                profile = splitter.calibration.profile(site.number)
                write_record(
                    run.layer_path(site.number), _split(context, splitter, site, profile, budget)
                )
            advance(_note(site))


def _split_sequentially(
    context: StageContext, run: StageRun, splitter: LayerSplitter, budget: Budget
) -> None:
    calibration, checkpoint = splitter.calibration, splitter.checkpoint
    profiles, routers = run.folder / PROFILE_FOLDER, run.folder / ROUTER_FOLDER

    def finished_ffn(site: Site) -> nn.Module:
        layout = read_record(run.layer_path(site.number), ExpertLayout)
        routed = read_routed(routers, site.number, layout)
        return splitter.converted_ffn(site.number, layout, routed, calibration.dtype)

    def finished_layer(layer: int) -> nn.Module:
        return layer_ffns(checkpoint, layer, finished_ffn)

    packed = read_packed_tokens(calibration.folder)
    decoder = DecoderStream(checkpoint, calibration.dtype, packed.input_ids_WT)
    stream = ResumableStream(decoder, run.folder, finished_layer)
    profiler = Profiler(
        packed, calibration.config, calibration.dtype, calibration.manifest.request.seed
    )
    with context.progress(STAGE, checkpoint.num_sites) as advance:
        for layer in range(checkpoint.num_layers):
            sites = checkpoint.layer_sites(layer)
            missing = [site for site in sites if not _has_propagated(run, splitter, site.number)]
            if missing:
                stream.seek(layer)
                for site, profile in _observed(stream, profiler, missing):
                    write_record(layer_path(profiles, site.number), profile)
                    layout = _split(context, splitter, site, profile, budget)
                    routed = splitter.route(site.number, layout, profile)
                    write_routed(routers, site.number, routed)
                    write_record(run.layer_path(site.number), layout)
                stream.advance(finished_layer(layer))
                stream.save()
            for site in sites:
                advance(_note(site))
    stream.discard()


def _observed(
    stream: ResumableStream, profiler: Profiler, missing: list[Site]
) -> Iterator[tuple[Site, LayerProfile]]:
    """Profiles of some FFNs of the layer in front of which the stream stands and stays."""
    checkpoint, dtype = stream.stream.checkpoint, profiler.dtype
    if not missing[0].is_inner:
        (site,) = missing
        yield site, profiler.observe(stream, checkpoint.ffn(site.number, dtype))
        return
    inputs = ExpertInputs()
    stream.observe_routing(inputs.add)
    for site in missing:
        yield site, profiler.of_site(inputs, site, checkpoint.ffn(site.number, dtype))


def _split(
    context: StageContext,
    splitter: LayerSplitter,
    site: Site,
    profile: LayerProfile,
    budget: Budget,
) -> ExpertLayout:
    if splitter.stays_dense(site.number, profile):
        context.say(
            f"warning: layer {site.layer}, {site.part} stays dense: {profile.tokens} calibration "
            f"tokens reach it, fewer than {MIN_EXPERT_TOKENS}; calibrate with more --tokens"
        )
    return splitter.split(site.number, profile, budget.active_neurons[site.number])


def _note(site: Site) -> str:
    return f"layer {site.layer}" + (f", {site.part}" if site.is_inner else "")


def _has_propagated(run: StageRun, splitter: LayerSplitter, site: int) -> bool:
    """Whether every file of an FFN is there that a sequential split writes."""
    if not run.has_layer(site):
        return False
    assert splitter.config.propagate is not None
    layout = read_record(run.layer_path(site), ExpertLayout)
    paths = [
        layer_path(run.folder / PROFILE_FOLDER, site),
        *routed_paths(run.folder / ROUTER_FOLDER, site, layout, splitter.config.propagate),
    ]
    return all(run.has_file(path) for path in paths)


def _summary(run: StageRun, splitter: LayerSplitter, budget: Budget) -> dict[str, Any]:
    checkpoint = splitter.checkpoint
    rows = []
    for site in checkpoint.sites:
        layout = read_record(run.layer_path(site.number), ExpertLayout)
        sizes = (checkpoint.hidden_size, layout.intermediate_size, checkpoint.dtype)
        shape = LayerShape(
            num_shared_neurons=layout.num_shared_neurons,
            n_routed_experts=layout.num_routed_experts,
            moe_intermediate_size=layout.expert_width,
            num_experts_per_tok=layout.top_k,
        )
        rows.append(
            {
                **site.row(),
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
