"""``calibrate``: run text through the dense model and keep what every method needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from weaver.artifacts.dtypes import DTYPES, dtype_name
from weaver.artifacts.manifest import InputRef, StageManifest, StageRequest
from weaver.artifacts.sensitivities import Sensitivities
from weaver.artifacts.store import read_record, values_digest, write_record
from weaver.artifacts.summaries import CalibratedFfn, CalibrateSummary
from weaver.artifacts.types import FIRST_TOKENS, LayerProfile
from weaver.config.loading import RunConfig
from weaver.config.sections import CalibrateConfig, ModelConfig, PartitionConfig, RouterConfig
from weaver.conversion.profiling import ExpertInputs, Profiler, ResumableStream
from weaver.conversion.sensitivities import measure_sensitivities, spread_windows
from weaver.data.grouping import GroupWindows, pack_groups
from weaver.data.packing import PackedTokens, pack
from weaver.data.sources import parse_data_spec
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.models.intake import check_windows
from weaver.models.sites import Site
from weaver.models.stream import DecoderStream, DenseFfn, layer_ffns
from weaver.models.two_level import RoutingObserver
from weaver.rundir.inputs import HELD_OUT_FILE, SENSITIVITY_FILE, TOKENS_FILE
from weaver.rundir.stage_run import StageContext, StageRun
from weaver.stages.estimate import estimate

STAGE = "calibrate"


def calibrate(
    context: StageContext,
    model: ModelConfig,
    config: CalibrateConfig,
    *,
    conversion: RunConfig | None = None,
) -> StageManifest:
    """Write one ``LayerProfile`` per FFN, and the packed tokens they were made from.

    Of a dense model these are its layers. In a model that is a Mixture of Experts already every
    expert is an FFN, profiled on the tokens that its layer's router sends to it.

    Args:
        context: run directory, seed, progress.
        model: the dense model.
        config: text, number of tokens, statistics.
        conversion: what follows; the disk has to have room for it too.

    Raises:
        WeaverError: no such model or data, too little text or disk, or a folder with another
            result.
    """
    checkpoint = Checkpoint(model, context.device)
    dtype = checkpoint.resolve_dtype(model.dtype)
    _check_markers(config, checkpoint)
    if config.groups and checkpoint.is_moe:
        raise WeaverError(
            "calibrate --groups of a Mixture-of-Experts model",
            why="an expert sees the tokens that its router sends it, and of some groups none",
            fix="leave --groups out and use another method than dive",
        )
    packed, held_out = _pack(context, checkpoint, config)
    check_windows(checkpoint.config, packed.input_ids_WT, what=model.path)
    identity = checkpoint.identity()
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config={**_recorded(config), "dtype": dtype_name(dtype)},
        inputs={
            "model": InputRef(path=identity.folder, digest=identity.digest),
            "tokenizer": InputRef(path=identity.folder, digest=identity.tokenizer_digest),
            "data": InputRef(path=", ".join(config.data), digest=_digest(packed, held_out)),
        },
    )
    run = StageRun(context, request, identity, request.config["dtype"])
    if run.status == "skip":
        return run.skipped()
    run.begin(disk=_least_disk(model, config, checkpoint, conversion))
    write_record(run.folder / TOKENS_FILE, packed)
    if held_out is not None:
        write_record(run.folder / HELD_OUT_FILE, held_out)
    stream = ResumableStream(
        DecoderStream(checkpoint, dtype, packed.input_ids_WT),
        run.folder,
        lambda layer: _dense_ffns(checkpoint, layer, dtype),
    )
    sensitivities = _sensitivities(context, run, checkpoint, packed, config)
    profiler = Profiler(packed, config, dtype, context.seed, sensitivities)
    with context.progress(STAGE, checkpoint.num_layers) as advance:
        for layer in range(checkpoint.num_layers):
            missing = [s for s in checkpoint.layer_sites(layer) if not run.has_layer(s.number)]
            if missing:
                stream.seek(layer)
                for site, profile in _profiles(stream, profiler, layer, missing):
                    write_record(run.layer_path(site.number), profile)
                stream.save()
            advance(f"layer {layer}")
    stream.discard()
    return run.finish(_summary(checkpoint, packed, run))


def _least_disk(
    model: ModelConfig,
    config: CalibrateConfig,
    checkpoint: Checkpoint,
    conversion: RunConfig | None,
) -> int:
    """Bytes that are written in any case: the estimates are right within their half and a fifth."""
    if conversion is not None:
        needs = estimate(conversion, checkpoint)
        return needs["calibrate"].disk // 2 + needs["assemble"].disk * 4 // 5
    plain = PartitionConfig(sequential=False), RouterConfig(refit=False)
    alone = RunConfig(model=model, calibrate=config, partition=plain[0], router=plain[1])
    return estimate(alone, checkpoint)["calibrate"].disk // 2


def _sensitivities(
    context: StageContext,
    run: StageRun,
    checkpoint: Checkpoint,
    packed: PackedTokens,
    config: CalibrateConfig,
) -> Sensitivities | None:
    """Measure what errors cost at each token, or read what an interrupted run measured.

    None where it is not asked for, the model has experts, or windows hold first tokens only.
    """
    if not config.sensitivity_tokens or checkpoint.is_moe:
        return None
    if config.sequence_length <= FIRST_TOKENS:
        return None
    path = run.folder / SENSITIVITY_FILE
    if not run.has_file(path):
        windows, length = packed.input_ids_WT.shape
        chosen_w = spread_windows(windows, config.sensitivity_tokens, length)
        dtype = DTYPES[run.dtype]
        stream = DecoderStream(checkpoint, dtype, packed.input_ids_WT[chosen_w])
        title = f"{STAGE}: sensitivities"
        write_record(path, measure_sensitivities(context, stream, run.folder, title))
    return read_record(path, Sensitivities)


def _dense_ffns(
    checkpoint: Checkpoint,
    layer: int,
    dtype: torch.dtype,
    observer: RoutingObserver | None = None,
) -> nn.Module:
    def make(site: Site) -> nn.Module:
        return DenseFfn(checkpoint.ffn(site.number, dtype))

    return layer_ffns(checkpoint, layer, make, observer)


def _profiles(
    stream: ResumableStream, profiler: Profiler, layer: int, missing: list[Site]
) -> Iterator[tuple[Site, LayerProfile]]:
    """Profiles of some FFNs of the layer in front of which the stream stands; steps past it."""
    checkpoint, dtype = stream.stream.checkpoint, profiler.dtype
    if not missing[0].is_inner:
        (site,) = missing
        yield site, profiler.advance(stream, checkpoint.ffn(site.number, dtype))
        return
    inputs = ExpertInputs()
    stream.advance(_dense_ffns(checkpoint, layer, dtype, inputs.add))
    for site in missing:
        yield site, profiler.of_site(inputs, site, checkpoint.ffn(site.number, dtype))


def _check_markers(config: CalibrateConfig, checkpoint: Checkpoint) -> None:
    neurons = min(checkpoint.neurons(site) for site in range(checkpoint.num_sites))
    if config.activation_top_k > neurons:
        raise WeaverError(
            f"activation_top_k={config.activation_top_k} of {neurons} neurons",
            why="a token marks at most every neuron of the FFN",
            fix=f"--set calibrate.activation_top_k={min(10, neurons)}",
        )


def _recorded(config: CalibrateConfig) -> dict[str, Any]:
    """The configuration without what is off by default and was not there in earlier versions."""
    values = config.model_dump(mode="json")
    if not config.groups:
        del values["groups"]
    return values


def _digest(packed: PackedTokens, held_out: GroupWindows | None) -> str:
    tensors = packed.tensors()
    if held_out is not None:
        tensors |= {f"held_out/{name}": value for name, value in held_out.tensors().items()}
    return values_digest(tensors)


def _pack(
    context: StageContext, checkpoint: Checkpoint, config: CalibrateConfig
) -> tuple[PackedTokens, GroupWindows | None]:
    specs = [parse_data_spec(text) for text in config.data]
    sizes: dict[str, Any] = {
        "sequence_length": config.sequence_length,
        "tokens": config.tokens,
        "seed": context.seed,
        "data_dir": context.data_dir,
    }
    if config.groups:
        return pack_groups(specs, checkpoint.tokenizer(), **sizes)
    return pack(specs, checkpoint.tokenizer(), **sizes), None


def _summary(checkpoint: Checkpoint, packed: PackedTokens, run: StageRun) -> CalibrateSummary:
    sites = [
        CalibratedFfn(
            layer=site.layer,
            part=site.part,
            neurons=checkpoint.neurons(site.number),
            tokens=read_record(run.layer_path(site.number), LayerProfile).tokens,
        )
        for site in (checkpoint.sites if checkpoint.is_moe else ())
    ]
    return CalibrateSummary(
        num_layers=checkpoint.num_layers,
        hidden_size=checkpoint.hidden_size,
        intermediate_size=checkpoint.intermediate_size,
        tokens=packed.input_ids_WT.numel(),
        samples=packed.sample_groups_M.numel(),
        groups=packed.groups,
        sites=tuple(sites) or None,
    )
