"""Estimate of the memory and disk that a conversion needs, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from weaver.config.loading import RunConfig
from weaver.conversion.memory import available_memory
from weaver.methods.allocation import pruned_width
from weaver.methods.registry import get_method, resolve_options
from weaver.models.checkpoint import Checkpoint
from weaver.models.stream import BATCH_TOKENS, SPILL_BYTES
from weaver.report.tables import format_bytes
from weaver.rundir.free_disk import free_disk

# Python, torch and transformers themselves, resident before any model is read.
PROCESS_BYTES = 400 * 2**20

# (tokens, F) tensors alive at once while a layer is observed: gate, up, h, the normalised h of the
# markers, and one temporary of the activation.
_OBSERVED_TENSORS = 5

# (F, F) tensors alive at once while a down projection is re-solved: two Gram matrices, their sum,
# the shrunk one and its Cholesky factor.
_REFIT_TENSORS = 5


@dataclass(frozen=True)
class Estimate:
    """Bytes needed by the conversion (without torch and Python themselves, ``PROCESS_BYTES``).

    Args:
        memory: of the stages that go layer by layer.
        eval_memory: of eval and bench, which hold both models.
        profile_disk: of the calibrate folder, and again of a sequential partition; re-solved down
            projections included.
        model_disk: of the converted model.
    """

    memory: int
    eval_memory: int
    profile_disk: int
    model_disk: int


def shortages(needs: Estimate, run_dir: Path) -> list[str]:
    """Shortages of a conversion, memory or disk above what is free now, a sentence each.

    Args:
        needs: from ``estimate``.
        run_dir: the run directory, which need not be there.
    """
    memory = available_memory()
    checks = (
        ("memory layer by layer", needs.memory + PROCESS_BYTES, memory),
        ("memory for eval and bench", needs.eval_memory + PROCESS_BYTES, memory),
        ("disk", needs.profile_disk + needs.model_disk, free_disk(run_dir)),
    )
    return [
        f"{what}: {format_bytes(need)} needed, {format_bytes(free)} free"
        for what, need, free in checks
        if need > free
    ]


def estimate(config: RunConfig, checkpoint: Checkpoint) -> Estimate:
    """Estimate a configuration's needs on a model.

    Peak = hidden states (up to the spill limit) + one decoder layer, its FFN twice more in float32
    for the method + the activations of one batch, or the matrices of a refit, + what a profile
    keeps, or the inputs of every layer that the backward pass keeps. The number of samples is taken
    as one in 200 tokens, which sets the size of the per-sample means.
    """
    calibrate = config.calibrate
    D, F, last = checkpoint.hidden_size, checkpoint.intermediate_size, checkpoint.num_layers - 1
    # FFNs, counted by their neurons and by the tokens that reach them: for a dense model both are
    # the number of layers.
    whole = sum(checkpoint.neurons(site) for site in range(checkpoint.num_sites)) / F
    reached = sum(ffn.token_share for ffn in checkpoint.dense_ffns())
    itemsize = checkpoint.resolve_dtype(config.model.dtype).itemsize
    parameters = checkpoint.total_parameters()
    layer = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.layer_names(last))
    hidden = min(calibrate.tokens * D * itemsize, SPILL_BYTES)
    batch = min(BATCH_TOKENS, calibrate.tokens) * F * 4 * _OBSERVED_TENSORS
    samples = max(1, calibrate.tokens // 200)
    inputs = min(int(calibrate.input_sample_mb * 1e6), calibrate.tokens * D * itemsize)
    means = 2 * samples * F * 4
    rows = calibrate.tokens * calibrate.activation_top_k * 4 + inputs
    # The inputs of a MoE layer are kept until all of its experts are profiled.
    inner = calibrate.tokens * D * itemsize if checkpoint.is_moe else 0
    # The backward pass keeps the inputs of every layer.
    backward = min(calibrate.sensitivity_tokens, calibrate.tokens) * D * itemsize
    backward *= 0 if checkpoint.is_moe else checkpoint.num_layers
    kept = max(means + rows + inner, backward)
    spec = get_method(config.partition.method)
    sequential = config.partition.sequential
    copies = 2 if (spec.sequential if sequential is None else sequential) else 1
    refit = spec.refit if config.router.refit is None else config.router.refit
    # A sequential partition and build-router each keep the re-solved projections and constants.
    experts = config.partition.num_experts or spec.num_experts or 0
    solved = D * (F + experts + 1) * 4 if refit else 0
    work = max(batch, _REFIT_TENSORS * F * F * 4 if refit else 0)
    per_token = resolve_options(spec, config.partition.options).experts_per_token
    converted = parameters
    if per_token is not None:
        # Prunings of the whole FFN overlap: each is stored in full.
        multiple, sparsity = config.partition.expert_width_multiple, config.partition.sparsity
        stored = experts * pruned_width(F, per_token, multiple, sparsity)
        converted += checkpoint.num_layers * (stored - F) * 3 * D
    eval_itemsize = checkpoint.resolve_dtype(config.eval.dtype).itemsize
    return Estimate(
        memory=hidden
        + layer * itemsize
        + 2 * 3 * D * F * 4
        + work
        + max(means + rows + kept, backward),
        eval_memory=(parameters + converted) * eval_itemsize,
        profile_disk=copies * round(whole * (means + solved) + reached * rows)
        + calibrate.tokens * D * itemsize,
        model_disk=converted * checkpoint.resolve_dtype(config.assemble.dtype).itemsize,
    )
