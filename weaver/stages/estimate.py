"""Estimate of the memory and disk that every stage of a run needs, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weaver.config.loading import RunConfig
from weaver.config.sections import DtypeName
from weaver.conversion.memory import available_memory
from weaver.methods.allocation import pruned_width
from weaver.methods.registry import get_method, resolve_options
from weaver.models.checkpoint import Checkpoint
from weaver.models.output_head import CPU_LOGIT_BYTES
from weaver.models.stream import BATCH_TOKENS, SPILL_BYTES
from weaver.report.tables import format_bytes
from weaver.rundir.free_disk import free_disk

# Python, torch, transformers and a tokenizer, resident before any model is read.
PROCESS_BYTES = 540 * 2**20

# (tokens, F) tensors alive at once while a layer is observed: gate, up, h, the normalised h of the
# markers, and one temporary of the activation.
_OBSERVED_TENSORS = 5

# (F, F) tensors alive at once while a down projection is re-solved: two Gram matrices, their sum,
# the shrunk one and its Cholesky factor.
_REFIT_TENSORS = 5

# (inputs, F) tensors alive at once while neurons are clustered by what they contribute to the kept
# FFN inputs: gate, up, h, the centred h, the contribution and one temporary.
_CLUSTERED_TENSORS = 6

# Tensors alive at once in the backward pass through a layer: (tokens, F) ones and their gradients,
# and (tokens, D) ones of the attention with the layer's input, output and gradient.
_BACKWARD_NEURONS, _BACKWARD_HIDDEN = 8, 15

# Chunks of logits alive at once: of a loss and its gradient, of two models and their difference.
_LOGIT_CHUNKS = 4


@dataclass(frozen=True)
class Needs:
    """Bytes that one stage needs.

    Args:
        memory: peak of a process that runs this stage alone.
        disk: of what it leaves in its folder.
    """

    memory: int
    disk: int = 0


def shortages(needs: Mapping[str, Needs], run_dir: Path) -> list[str]:
    """Shortages of a run, memory or disk above what is free now, a sentence each.

    Args:
        needs: from ``estimate``.
        run_dir: the run directory, which need not be there.
    """
    memory = available_memory()
    checks = [(f"memory for {stage}", each.memory, memory) for stage, each in needs.items()]
    disk = sum(each.disk for each in needs.values())
    return [
        f"{what}: {format_bytes(need)} needed, {format_bytes(free)} free"
        for what, need, free in (*checks, ("disk", disk, free_disk(run_dir)))
        if need > free
    ]


def estimate(config: RunConfig, checkpoint: Checkpoint) -> dict[str, Needs]:
    """Estimate what the stages of a configuration need on a model.

    Layer by layer, peak = hidden states (up to the spill limit) + embeddings and head + one decoder
    layer, its FFN twice more in float32 for the method + the activations of one batch, or the
    matrices of a refit, + what a profile keeps, or the backward pass with the inputs of every
    layer. ``eval``, ``bench`` and the smoke test hold both models, ``finetune`` twice as much in
    float32, for gradients and moments (of all weights: low-rank adapters need less). The number of
    samples is taken as one in 200 tokens, which sets the size of the per-sample means.
    """
    sizes = _Sizes(config, checkpoint)
    stages = {
        "calibrate": Needs(sizes.streamed(sizes.backward()), sizes.profiles + sizes.hidden_disk),
        "partition": Needs(
            sizes.streamed(sizes.split()),
            sizes.profiles + sizes.solved if sizes.sequential else 0,
        ),
        "build-router": Needs(sizes.streamed(sizes.refit()), sizes.solved),
        "assemble": Needs(sizes.both(config.assemble.dtype), sizes.model(config.assemble.dtype)),
        "eval": Needs(sizes.both(config.eval.dtype)),
        "bench": Needs(sizes.both(config.bench.dtype) + sizes.logits()),
    }
    if config.finetune is not None:
        stages["finetune"] = Needs(2 * sizes.both("float32"), 2 * sizes.model("float32"))
    return stages


class _Sizes:
    """Bytes of what stages hold and write, for one configuration and model."""

    def __init__(self, config: RunConfig, checkpoint: Checkpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        spec, given = get_method(config.partition.method), config.partition.sequential
        self.sequential = spec.sequential if given is None else given
        self._D, self._F = checkpoint.hidden_size, checkpoint.intermediate_size
        self._experts = config.partition.num_experts or spec.num_experts or 0
        self._refit = spec.refit if config.router.refit is None else config.router.refit
        self._itemsize = checkpoint.resolve_dtype(config.model.dtype).itemsize
        tokens = config.calibrate.tokens
        # FFNs, counted by their neurons and by the tokens that reach them: for a dense model both
        # are the number of layers.
        whole = sum(checkpoint.neurons(site) for site in range(checkpoint.num_sites)) / self._F
        reached = sum(ffn.token_share for ffn in checkpoint.dense_ffns())
        means = 2 * max(1, tokens // 200) * self._F * 4
        self.hidden_disk = tokens * self._D * self._itemsize
        self._inputs = min(int(config.calibrate.input_sample_mb * 1e6), self.hidden_disk)
        rows = tokens * config.calibrate.activation_top_k * 4 + self._inputs
        # The inputs of a MoE layer are kept until all of its experts are profiled.
        self._kept = means + rows + (self.hidden_disk if checkpoint.is_moe else 0)
        self.profiles = round(whole * means + reached * rows)
        # Re-solved projections and constants.
        solved = self._D * (self._F + self._experts + 1) * 4 if self._refit else 0
        self.solved = round(whole * solved)

    def streamed(self, work: int) -> int:
        """Peak of a stage that goes layer by layer, given the most that it works with in one."""
        checkpoint = self._checkpoint
        names = (*checkpoint.outer_names(), *checkpoint.layer_names(checkpoint.num_layers - 1))
        weights = sum(math.prod(checkpoint.shape(name)) for name in names) * self._itemsize
        hidden = min(self.hidden_disk, SPILL_BYTES)
        return PROCESS_BYTES + hidden + weights + 2 * 3 * self._D * self._F * 4 + work

    def backward(self) -> int:
        """Of calibrate: a batch that is observed, or the backward pass of the sensitivities."""
        calibrate, checkpoint = self._config.calibrate, self._checkpoint
        tokens = 0 if checkpoint.is_moe else min(calibrate.sensitivity_tokens, calibrate.tokens)
        inputs = tokens * self._D * self._itemsize * checkpoint.num_layers
        batch = min(BATCH_TOKENS, tokens) * self._itemsize
        graph = batch * (_BACKWARD_NEURONS * self._F + _BACKWARD_HIDDEN * self._D)
        return max(self._observed() + self._kept, inputs + graph + _LOGIT_CHUNKS * CPU_LOGIT_BYTES)

    def split(self) -> int:
        """Of partition: a batch that is observed, clusters, or a refit; and the profile."""
        clusters = 0
        if self._config.partition.method == "weave":
            inputs = self._inputs // (self._D * self._itemsize)
            clusters = _CLUSTERED_TENSORS * inputs * self._F * self._itemsize
        return max(max(self._observed(), clusters) + 2 * self._kept, self.refit())

    def refit(self) -> int:
        """Of build-router."""
        return (_REFIT_TENSORS * self._F * self._F * 4 if self._refit else 0) + 2 * self._kept

    def _observed(self) -> int:
        tokens = min(BATCH_TOKENS, self._config.calibrate.tokens)
        return tokens * self._F * 4 * _OBSERVED_TENSORS

    def model(self, dtype: DtypeName) -> int:
        """Weights of the converted model."""
        partition, checkpoint = self._config.partition, self._checkpoint
        converted = checkpoint.total_parameters()
        options = resolve_options(get_method(partition.method), partition.options)
        if options.experts_per_token is not None:
            # Prunings of the whole FFN overlap: each is stored in full.
            multiple, sparsity = partition.expert_width_multiple, partition.sparsity
            width = pruned_width(self._F, options.experts_per_token, multiple, sparsity)
            stored = self._experts * width - self._F
            converted += checkpoint.num_layers * stored * 3 * self._D
        return converted * checkpoint.resolve_dtype(dtype).itemsize

    def both(self, dtype: DtypeName) -> int:
        """Peak of a stage that holds the dense and the converted model."""
        wanted, stored = self._checkpoint.resolve_dtype(dtype), self._checkpoint.dtype
        # A file of another dtype stays mapped beside its cast weights until a model is complete.
        size = wanted.itemsize + (stored.itemsize if wanted != stored else 0)
        dense = self._checkpoint.total_parameters() * size
        return PROCESS_BYTES + dense + self.model(dtype) + _LOGIT_CHUNKS * CPU_LOGIT_BYTES

    def logits(self) -> int:
        """Of bench, whose forwards give the logits of every token, of two models in turn."""
        tokens, checkpoint = max(self._config.bench.tokens), self._checkpoint
        itemsize = checkpoint.resolve_dtype(self._config.bench.dtype).itemsize
        return 2 * tokens * int(checkpoint.config.get_text_config().vocab_size) * itemsize
