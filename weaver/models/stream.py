"""Running a decoder over packed windows with one layer's weights in memory at a time."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.artifacts.store import disk_errors
from weaver.models.checkpoint import Checkpoint

# Tokens run through a layer at once: large enough for full GEMM speed, small enough that the
# (tokens, F) activations of a 14k-neuron FFN stay under 250 MB in float32.
BATCH_TOKENS = 4096

# Hidden states above this size live in a file that the operating system pages in and out.
SPILL_BYTES = 2 * 1024**3
SPILL_FILE = "hidden_states.bin"

FfnObserver = Callable[[Tensor], None]


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what the model passes to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


class DenseFfn(nn.Module):
    """The dense FFN, which shows its inputs to an observer.

    The same module runs with and without an observer, so that a replayed layer gives the same bits
    as the observed one did.
    """

    def __init__(self, weights: GluWeights, observer: FfnObserver | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.observer = observer

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.observer is not None:
            self.observer(x_TD)
        return glu_forward(x_TD, self.weights).view_as(hidden_states)


class InputTap(nn.Module):
    """Shows an FFN's inputs to an observer and computes nothing.

    For passes whose outputs are thrown away: what an FFN is shown does not depend on what it
    returns.
    """

    def __init__(self, observer: FfnObserver) -> None:
        super().__init__()
        self.observer = observer

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.observer(hidden_states.reshape(-1, hidden_states.shape[-1]))
        return hidden_states


class DecoderStream:
    """A decoder whose layers are materialised one by one.

    Masks, position ids and rotary embeddings are the ones the model's own forward passes to each
    layer, recorded once with stand-in layers; nothing about a family is known here.

    Args:
        checkpoint: the dense model.
        dtype: dtype of the computation.
        input_ids_WT: packed windows, all of the same length and without padding.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, input_ids_WT: Tensor) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.input_ids_WT = input_ids_WT
        model_class = getattr(transformers, checkpoint.family.causal_lm)
        with init_empty_weights(include_buffers=False):
            self._skeleton: nn.Module = model_class(checkpoint.config).eval()
        path, _, name = checkpoint.family.layers.rpartition(".")
        self._backbone = self._skeleton.get_submodule(path)
        self._layers: nn.ModuleList = getattr(self._backbone, name)
        self._recorders = [_Recorder(layer) for layer in self._layers]
        setattr(self._backbone, name, nn.ModuleList(self._recorders))
        self._arguments: list[dict[str, Any]] = []

    @torch.no_grad()
    def embed(self, spill_folder: Path) -> Tensor:
        """Inputs of the first layer, (W, T, D), and the arguments of every layer."""
        hidden_WTD = self.allocate(spill_folder)
        self._load_outer()
        for window in range(hidden_WTD.shape[0]):
            self._backbone(input_ids=self.input_ids_WT[window : window + 1], use_cache=False)
            recorded = self._recorders[0].hidden
            assert isinstance(recorded, Tensor)
            hidden_WTD[window] = recorded[0]
        self._keep_arguments()
        self._backbone.to("meta")
        return hidden_WTD

    @torch.no_grad()
    def prepare(self) -> None:
        """Record the layers' arguments without embedding all windows (used on resume)."""
        self._load_outer()
        self._backbone(input_ids=self.input_ids_WT[:1], use_cache=False)
        self._keep_arguments()
        self._backbone.to("meta")

    @torch.no_grad()
    def run(self, layer: int, ffn: nn.Module, hidden_WTD: Tensor, *, write: bool) -> None:
        """Run one decoder layer with the given FFN over all windows.

        Args:
            layer: index of the layer.
            ffn: the FFN to use: ``DenseFfn`` or ``MoEFeedForward``.
            hidden_WTD: inputs of the layer; with ``write``, replaced by its outputs.
            write: False to only let the FFN observe its inputs.
        """
        module = copy.deepcopy(self._layers[layer])
        setattr(module, self.checkpoint.family.ffn, nn.Identity())
        state = self.checkpoint.layer_state(layer, self.dtype)
        module.load_state_dict(state, assign=True)
        setattr(module, self.checkpoint.family.ffn, ffn)
        module.eval()
        step = max(1, BATCH_TOKENS // hidden_WTD.shape[1])
        for start in range(0, hidden_WTD.shape[0], step):
            batch = hidden_WTD[start : start + step]
            output = module(batch, **self._arguments[layer])
            output = output[0] if isinstance(output, tuple) else output
            if write:
                batch.copy_(output)

    def _keep_arguments(self) -> None:
        self._arguments = [dict(recorder.arguments) for recorder in self._recorders]
        for recorder in self._recorders:
            recorder.hidden = None

    def _load_outer(self) -> None:
        prefix = f"{self.checkpoint.family.layers.rpartition('.')[0]}."
        names = [name for name in self.checkpoint.outer_names() if name.startswith(prefix)]
        state = {
            name.removeprefix(prefix): self.checkpoint.tensor(name).to(self.dtype) for name in names
        }
        self._backbone.load_state_dict(state, assign=True, strict=False)

    def allocate(self, folder: Path) -> Tensor:
        """Uninitialised hidden states, (W, T, D); above ``SPILL_BYTES`` in a file below ``folder``.

        Raises:
            WeaverError: the disk has no room for the file.
        """
        shape = (*self.input_ids_WT.shape, self.checkpoint.hidden_size)
        count = math.prod(shape)
        if count * self.dtype.itemsize <= SPILL_BYTES:
            return torch.empty(shape, dtype=self.dtype)
        path = folder / SPILL_FILE
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            # Reserved now: a write into a mapped hole of a full disk would kill the process.
            with path.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, count * self.dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=self.dtype).view(shape)
