"""``partition``: split every FFN into shared and routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from weaver.artifacts.affinity import Affinity
from weaver.artifacts.manifest import StageManifest, StageRequest
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.summaries import PartitionSummary, SplitFfn
from weaver.artifacts.types import ExpertLayout, LayerProfile
from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.conversion.domain_affinity import affinity_summary, mine_affinity, require_groups
from weaver.conversion.layer_budgets import Budget, allocate
from weaver.conversion.partition_settings import PartitionSettings, resolve_settings
from weaver.conversion.profiling import ExpertInputs, Profiler, ResumableStream
from weaver.conversion.routing import (
    read_routed,
    routed_paths,
    write_routed,
)
from weaver.conversion.splitter import MIN_EXPERT_TOKENS, LayerSplitter
from weaver.methods.base import GroupOptions
from weaver.models.accounting import LayerShape
from weaver.models.checkpoint import Checkpoint
from weaver.models.forecast import SPEED_TOKENS, predicted_speedup
from weaver.models.sites import Site
from weaver.models.stream import DecoderStream, layer_ffns
from weaver.rundir.inputs import (
    PROFILE_FOLDER,
    ROUTER_FOLDER,
    Calibration,
    open_calibration,
    read_packed_tokens,
    read_sensitivities,
)
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext, StageRun

STAGE = "partition"


def partition(
    context: StageContext,
    config: PartitionConfig,
    router: RouterConfig,
    calibration_folder: Path | None = None,
) -> StageManifest:
    """Write one ``ExpertLayout`` per FFN: per layer, or per expert of a MoE model.

    One-shot, every layer is split by its profile on the dense model. Sequentially, layer l is
    profiled again on the output of the converted layers before it (CMoE, arXiv:2502.04416): the
    stage then streams the calibration tokens once more and keeps the new profiles beside the
    layouts.

    Args:
        context: run directory, seed, progress.
        config: method, sparsity, experts.
        router: router and compensation of the layers in front, where they are converted first.
        calibration_folder: a calibrate folder of another run; default: this run's own.

    Raises:
        WeaverError: no finished calibration, unknown method or options, or a sparsity that the
            experts cannot express.
    """
    settings = resolve_settings(config, router)
    calibration = open_calibration(
        calibration_folder or context.folder("calibrate"),
        trust_remote_code=context.trust_remote_code,
        device=context.device,
    )
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config=settings.recorded(),
        inputs={"calibrate": calibration.ref},
    )
    run = StageRun(context, request, calibration.identity, calibration.manifest.dtype)
    if run.status == "skip":
        return run.skipped()
    splitter = LayerSplitter(calibration, settings, context.seed)
    if settings.spec.prunes_groups:
        require_groups(calibration, settings.spec.name, splitter.num_experts)
    run.begin(disk=_least_disk(settings, calibration))
    affinity = None
    if isinstance(settings.options, GroupOptions):
        affinity = mine_affinity(context, run, splitter, settings.options.affinity_windows)
        splitter.group_experts_G = affinity.experts_G
    budget = allocate(context, run.folder, splitter)
    split_all = _split_sequentially if settings.config.sequential else _split_one_shot
    split_all(context, run, splitter, budget)
    return run.finish(_summary(run, splitter, budget, affinity))


def _least_disk(settings: PartitionSettings, calibration: Calibration) -> int:
    """Bytes that are written in any case: layer by layer, profiles are made once more."""
    again = settings.config.sequential
    sites = range(calibration.checkpoint.num_sites if again else 0)
    return sum(layer_path(calibration.folder, site).stat().st_size for site in sites)


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
        packed,
        calibration.config,
        calibration.dtype,
        calibration.manifest.request.seed,
        read_sensitivities(calibration.folder),
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
    layout = read_record(run.layer_path(site), ExpertLayout)
    paths = [
        layer_path(run.folder / PROFILE_FOLDER, site),
        *routed_paths(run.folder / ROUTER_FOLDER, site, layout, splitter.settings.router),
    ]
    return all(run.has_file(path) for path in paths)


def _summary(
    run: StageRun, splitter: LayerSplitter, budget: Budget, affinity: Affinity | None
) -> PartitionSummary:
    return PartitionSummary(
        method=splitter.settings.spec.name,
        layers=tuple(
            _split_ffn(run, splitter.checkpoint, site) for site in splitter.checkpoint.sites
        ),
        predicted_kl=budget.predicted_kl,
        uniform_kl=budget.uniform_kl,
        affinity=None if affinity is None else affinity_summary(affinity),
    )


def _split_ffn(run: StageRun, checkpoint: Checkpoint, site: Site) -> SplitFfn:
    layout = read_record(run.layer_path(site.number), ExpertLayout)
    sizes = (checkpoint.hidden_size, layout.intermediate_size, checkpoint.dtype)
    shape = LayerShape(
        num_shared_neurons=layout.num_shared_neurons,
        n_routed_experts=layout.num_routed_experts,
        moe_intermediate_size=layout.expert_width,
        num_experts_per_tok=layout.top_k,
    )
    return SplitFfn(
        layer=site.layer,
        part=site.part,
        shared_neurons=layout.num_shared_neurons,
        shared_share=round(layout.num_shared_neurons / layout.intermediate_size, 6),
        experts=layout.num_routed_experts,
        expert_width=layout.expert_width,
        top_k=layout.top_k,
        selection=layout.selection,
        active_neurons=layout.active_neurons,
        sparsity=round(layout.ffn_sparsity, 6),
        predicted_speedups={
            str(tokens): round(predicted_speedup([shape], *sizes, tokens), 3)
            for tokens in SPEED_TOKENS
        },
    )
