"""``calibrate``: run text through the dense model and keep what every method needs to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weaver.artifacts.manifest import InputRef, StageManifest, StageRequest
from weaver.artifacts.store import read_record, values_digest, write_record
from weaver.config.sections import CalibrateConfig, ModelConfig
from weaver.data.grouping import GroupWindows, pack_groups
from weaver.data.packing import PackedTokens, pack
from weaver.data.sources import parse_data_spec
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.models.stream import DecoderStream, DenseFfn
from weaver.stages.profiling import Profiler, ResumableStream
from weaver.stages.runner import StageContext, StageRun

TOKENS_FILE = "tokens.safetensors"
HELD_OUT_FILE = "held_out.safetensors"
STAGE = "calibrate"


def calibrate(context: StageContext, model: ModelConfig, config: CalibrateConfig) -> StageManifest:
    """Write one ``LayerProfile`` per layer, and the packed tokens they were made from.

    Args:
        context: run directory, seed, progress.
        model: the dense model.
        config: text, number of tokens, statistics.

    Raises:
        WeaverError: no such model or data, too little text, or a folder with another result.
    """
    checkpoint = Checkpoint(model)
    dtype = checkpoint.resolve_dtype(model.dtype)
    _check_markers(config, checkpoint)
    packed, held_out = _pack(context, checkpoint, config)
    identity = checkpoint.identity()
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config={**_recorded(config), "dtype": str(dtype).removeprefix("torch.")},
        inputs={
            "model": InputRef(path=identity.folder, digest=identity.digest),
            "tokenizer": InputRef(path=identity.folder, digest=identity.tokenizer_digest),
            "data": InputRef(path=", ".join(config.data), digest=_digest(packed, held_out)),
        },
    )
    run = StageRun(context, request, identity, request.config["dtype"])
    if run.status == "skip":
        return run.skipped()
    run.begin()
    write_record(run.folder / TOKENS_FILE, packed)
    if held_out is not None:
        write_record(run.folder / HELD_OUT_FILE, held_out)
    stream = ResumableStream(
        DecoderStream(checkpoint, dtype, packed.input_ids_WT),
        run.folder,
        lambda layer: DenseFfn(checkpoint.ffn(layer, dtype)),
    )
    profiler = Profiler(packed, config, dtype, context.seed)
    with context.progress(STAGE, checkpoint.num_layers) as advance:
        for layer in range(checkpoint.num_layers):
            if not run.has_layer(layer):
                stream.seek(layer)
                profile = profiler.advance(stream, checkpoint.ffn(layer, dtype))
                write_record(run.layer_path(layer), profile)
                stream.save()
            advance(f"layer {layer}")
    stream.discard()
    return run.finish(_summary(checkpoint, packed))


def _check_markers(config: CalibrateConfig, checkpoint: Checkpoint) -> None:
    if config.activation_top_k > checkpoint.intermediate_size:
        raise WeaverError(
            f"activation_top_k={config.activation_top_k} of {checkpoint.intermediate_size} neurons",
            why="a token marks at most every neuron of the FFN",
            fix=f"--activation-top-k {min(10, checkpoint.intermediate_size)}",
        )


def read_packed_tokens(folder: Path) -> PackedTokens:
    """The packed tokens of a finished calibrate stage."""
    return read_record(folder / TOKENS_FILE, PackedTokens)


def read_held_out(folder: Path) -> GroupWindows:
    """The held-out windows of a finished calibrate stage that keeps groups apart."""
    return read_record(folder / HELD_OUT_FILE, GroupWindows)


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


def _summary(checkpoint: Checkpoint, packed: PackedTokens) -> dict[str, Any]:
    return {
        "num_layers": checkpoint.num_layers,
        "hidden_size": checkpoint.hidden_size,
        "intermediate_size": checkpoint.intermediate_size,
        "tokens": packed.input_ids_WT.numel(),
        "samples": packed.sample_groups_M.numel(),
        "groups": list(packed.groups),
    }
