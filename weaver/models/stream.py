"""Running a decoder over packed windows with one layer's weights in memory at a time."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from weaver.algorithms.glu import GluWeights, glu_forward
from weaver.artifacts.finite import overflow_advice, require_finite
from weaver.artifacts.store import disk_errors
from weaver.artifacts.types import FIRST_TOKENS
from weaver.models.checkpoint import Checkpoint
from weaver.models.device import CPU, has_room
from weaver.models.hf import model_class
from weaver.models.moe import MoEFeedForward
from weaver.models.pacing import Pacer
from weaver.models.sites import Site
from weaver.models.two_level import (
    ExpertList,
    InnerFfns,
    RoutingObserver,
    TwoLevelFeedForward,
    place,
)

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
        self.returned: Tensor | None = None
        self.arguments: dict[str, Any] = {}
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states if self.returned is None else self.returned


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


def _without_ffns(ffn: nn.Module) -> nn.Module:
    """Return a stand-in without FFN weights, so that the rest of a layer can be loaded strictly."""
    if not isinstance(ffn, InnerFfns):
        return nn.Identity()
    shared = None if ffn.shared is None else nn.Identity()
    return InnerFfns(ExpertList([]), shared, ffn.outer)


def layer_ffns(
    checkpoint: Checkpoint,
    layer: int,
    make: Callable[[Site], nn.Module],
    observer: RoutingObserver | None = None,
) -> nn.Module:
    """FFN modules of one layer, for ``DecoderStream.run``.

    Args:
        checkpoint: the model.
        layer: index of the layer.
        make: builds the module of a site.
        observer: told what reaches the experts of a MoE layer.
    """
    sites = checkpoint.layer_sites(layer)
    if not sites[0].is_inner:
        return make(sites[0])
    shared = [make(site) for site in sites if site.shared]
    return InnerFfns(
        ExpertList([make(site) for site in sites if not site.shared], observer),
        shared[0] if shared else None,
        _outer(checkpoint, layer),
    )


def routing_tap(checkpoint: Checkpoint, layer: int, observer: RoutingObserver) -> InnerFfns:
    """The FFNs of a MoE layer that compute nothing: ``InputTap`` for what reaches its experts."""
    sites = checkpoint.layer_sites(layer)
    experts = sum(not site.shared for site in sites)
    shared = nn.Identity() if experts < len(sites) else None
    tap = ExpertList([], observer, num_experts=experts)
    return InnerFfns(tap, shared, _outer(checkpoint, layer))


def _outer(checkpoint: Checkpoint, layer: int) -> TwoLevelFeedForward | None:
    shape = checkpoint.ffns.outer.get(layer)
    if shape is None:
        return None
    with torch.device("meta"):
        return TwoLevelFeedForward(shape, checkpoint.hidden_size, checkpoint.activation)


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
        self.device = checkpoint.device
        self.input_ids_WT = input_ids_WT.to(self.device)
        causal_lm = model_class(checkpoint.config, checkpoint.family)
        # The buffers, which no checkpoint holds, are computed on the device.
        with self.device, init_empty_weights(include_buffers=False):
            self._skeleton: PreTrainedModel = causal_lm(checkpoint.config).eval()
        path, _, name = checkpoint.family.layers.rpartition(".")
        self._prefix = f"{path}."
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
        self._release_outer()
        return hidden_WTD

    @torch.no_grad()
    def prepare(self) -> None:
        """Record the layers' arguments without embedding all windows (used on resume)."""
        self._load_outer()
        self._backbone(input_ids=self.input_ids_WT[:1], use_cache=False)
        self._keep_arguments()
        self._release_outer()

    @torch.no_grad()
    def run(self, layer: int, ffn: nn.Module, hidden_WTD: Tensor, *, write: bool) -> None:
        """Run one decoder layer with the given FFN over all windows.

        Args:
            layer: index of the layer.
            ffn: the FFN to use: ``DenseFfn`` or ``MoEFeedForward``; for a MoE layer ``InnerFfns``.
            hidden_WTD: inputs of the layer; with ``write``, replaced by its outputs.
            write: False to only let the FFN observe its inputs.
        """
        module = self.layer(layer, ffn)
        windows = Pacer((), FIRST_TOKENS)
        if isinstance(ffn, MoEFeedForward) and ffn.paced is not None:
            ffn.pace = (windows, 0)
        places_T = torch.arange(hidden_WTD.shape[1], device=self.device)
        for batch in self.batches(hidden_WTD):
            windows.free(places_T.expand(batch.shape[:2]))
            output = self.apply(module, layer, batch.to(self.device, non_blocking=True))
            if write:
                why, fix = overflow_advice(self.dtype)
                require_finite({"its output": output}, f"layer {layer}", why=why, fix=fix)
                batch.copy_(output)

    def layer(self, layer: int, ffn: nn.Module) -> nn.Module:
        """One decoder layer with its weights and the given FFN."""
        family = self.checkpoint.family
        module = copy.deepcopy(self._layers[layer])
        # Without the FFNs first: what is left has to be in the checkpoint, all of it.
        place(module, family, _without_ffns(ffn))
        module.load_state_dict(self.checkpoint.layer_state(layer, self.dtype), assign=True)
        if isinstance(ffn, InnerFfns):
            ffn = InnerFfns(ffn.experts, ffn.shared)
        place(module, family, ffn)
        return module.eval()

    def batches(self, values_WTD: Tensor) -> tuple[Tensor, ...]:
        """Views of as many windows as are run at once."""
        step = max(1, BATCH_TOKENS // values_WTD.shape[1])
        return tuple(
            values_WTD[start : start + step] for start in range(0, values_WTD.shape[0], step)
        )

    def apply(self, module: nn.Module, layer: int, hidden_BTD: Tensor) -> Tensor:
        """Outputs of a decoder layer, called as the model calls it, (B, T, D)."""
        output = module(hidden_BTD, **self._arguments[layer])
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def load_head(self) -> PreTrainedModel:
        """The model around its layers: embeddings, final norm and output head have weights."""
        self._load_outer()
        names = [name for name in self.checkpoint.outer_names() if not self._in_backbone(name)]
        state = {name: self.checkpoint.tensor(name).to(self.device, self.dtype) for name in names}
        self._skeleton.load_state_dict(state, assign=True, strict=False)
        if not names:
            self._skeleton.get_output_embeddings().weight = (
                self._skeleton.get_input_embeddings().weight
            )
        self._skeleton.requires_grad_(False)
        return self._skeleton

    def normalise(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states behind the last layer as the output head reads them, (B, T, D).

        The model's own forward runs with a stand-in for the last layer that returns them.
        """
        last = self._recorders[-1]
        last.returned = hidden_BTD
        try:
            ids_BT = self.input_ids_WT[: hidden_BTD.shape[0]]
            output = self._backbone(input_ids=ids_BT, use_cache=False)
        finally:
            last.returned = None
        normed_BTD: Tensor = output.last_hidden_state
        return normed_BTD

    def _keep_arguments(self) -> None:
        self._arguments = [dict(recorder.arguments) for recorder in self._recorders]
        for recorder in self._recorders:
            recorder.hidden = None

    def _load_outer(self) -> None:
        names = [name for name in self.checkpoint.outer_names() if self._in_backbone(name)]
        state = {
            name.removeprefix(self._prefix): self.checkpoint.tensor(name).to(
                self.device, self.dtype
            )
            for name in names
        }
        self._backbone.load_state_dict(state, assign=True, strict=False)

    def _release_outer(self) -> None:
        """Free embeddings and norm, but no buffers, which no checkpoint holds."""
        state = {name: value.to("meta") for name, value in self._backbone.named_parameters()}
        self._backbone.load_state_dict(state, assign=True, strict=False)

    def _in_backbone(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def allocate(self, folder: Path) -> Tensor:
        """Uninitialised hidden states, (W, T, D).

        They lie on a GPU that has room for them, else in main memory, from where a GPU reads pinned
        pages; above ``SPILL_BYTES`` in a file below ``folder``.

        Raises:
            WeaverError: the disk has no room for the file.
        """
        shape = (*self.input_ids_WT.shape, self.checkpoint.hidden_size)
        count = math.prod(shape)
        size = count * self.dtype.itemsize
        if has_room(self.device, size):
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        if size <= SPILL_BYTES:
            pinned = self.device.type == "cuda"
            return torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=pinned)
        path = folder / SPILL_FILE
        with disk_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            # Reserved now: a write into a mapped hole of a full disk would kill the process.
            with path.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, size)
        mapped = torch.from_file(str(path), shared=True, size=count, dtype=self.dtype, device=CPU)
        return mapped.view(shape)
