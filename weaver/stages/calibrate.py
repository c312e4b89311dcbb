"""``calibrate``: run text through the dense model and keep what every method needs to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weaver.artifacts.manifest import InputRef, StageManifest, StageRequest
from weaver.artifacts.store import read_record, values_digest, write_record
from weaver.config.sections import CalibrateConfig, ModelConfig
from weaver.data.packing import PackedTokens, pack
from weaver.data.sources import parse_data_spec
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.models.stream import DecoderStream, DenseFfn
from weaver.stages.profiling import Profiler, ResumableStream
from weaver.stages.runner import StageContext, StageRun

TOKENS_FILE = "tokens.safetensors"
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
    packed = _pack(context, checkpoint, config)
    identity = checkpoint.identity()
    request = StageRequest(
        stage=STAGE,
        seed=context.seed,
        config={**config.model_dump(mode="json"), "dtype": str(dtype).removeprefix("torch.")},
        inputs={
            "model": InputRef(path=identity.folder, digest=identity.digest),
            "tokenizer": InputRef(path=identity.folder, digest=identity.tokenizer_digest),
            "data": InputRef(path=", ".join(config.data), digest=values_digest(packed.tensors())),
        },
    )
    run = StageRun(context, request, identity, request.config["dtype"])
    if run.status == "skip":
        return run.skipped()
    run.begin()
    write_record(run.folder / TOKENS_FILE, packed)
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


def _pack(context: StageContext, checkpoint: Checkpoint, config: CalibrateConfig) -> PackedTokens:
    return pack(
        [parse_data_spec(text) for text in config.data],
        checkpoint.tokenizer(),
        sequence_length=config.sequence_length,
        tokens=config.tokens,
        seed=context.seed,
        data_dir=context.data_dir,
    )


def _summary(checkpoint: Checkpoint, packed: PackedTokens) -> dict[str, Any]:
    return {
        "num_layers": checkpoint.num_layers,
        "hidden_size": checkpoint.hidden_size,
        "intermediate_size": checkpoint.intermediate_size,
        "tokens": packed.input_ids_WT.numel(),
        "samples": packed.sample_groups_M.numel(),
        "groups": list(packed.groups),
    }
