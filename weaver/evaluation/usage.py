"""How evenly a converted model uses its routed experts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from weaver.artifacts.results import LayerUsage
from weaver.evaluation.logits import final_hidden
from weaver.kernels.reference import Routing


@runtime_checkable
class RoutedLayer(Protocol):
    """Interface of a module whose expert usage is counted: number of experts, and routing."""

    @property
    def num_routed_experts(self) -> int:
        """E; 0 for a static layer."""

    def routing(self, x_TD: Tensor) -> Routing | None:
        """The experts of every token; None for a static layer."""


@dataclass
class _Counter:
    """Selections of one layer so far."""

    module: str
    counts_E: Tensor
    tokens: int = 0

    def add(self, layer: RoutedLayer, hidden: Tensor) -> None:
        routing = layer.routing(hidden.reshape(-1, hidden.shape[-1]))
        assert routing is not None
        self.counts_E += routing.counts_E().cpu()
        self.tokens += routing.num_tokens


class UsageCounts:
    """Selections per layer, filled while the model runs inside ``count_usage``."""

    def __init__(self) -> None:
        self._counters: list[_Counter] = []

    def watch(self, name: str, module: nn.Module, layer: RoutedLayer) -> RemovableHandle:
        """Count what ``module``, seen as ``layer``, routes until the handle is removed."""
        counter = _Counter(
            name, torch.zeros(layer.num_routed_experts, dtype=torch.int64, device="cpu")
        )
        self._counters.append(counter)

        @torch.no_grad()
        def count(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            counter.add(layer, inputs[0])

        return module.register_forward_pre_hook(count)

    def summary(self) -> tuple[LayerUsage, ...]:
        """Usage per routed layer that has seen tokens, in model order."""
        return tuple(
            layer_usage(counter.counts_E, counter.tokens, counter.module)
            for counter in self._counters
            if counter.tokens
        )


def layer_usage(counts_E: Tensor, tokens: int, module: str) -> LayerUsage:
    """Balance of one layer's experts; the formulas stand with ``LayerUsage``.

    Args:
        counts_E: selections per routed expert, int64, (E,).
        tokens: tokens routed.
        module: name of the module; its first number is the layer.
    """
    counts = counts_E.double()
    total = counts.sum().item()
    shares = (counts / max(total, 1.0)).tolist()
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    return LayerUsage(
        layer=int(number.group(1)) if number else 0,
        module=module,
        tokens=tokens,
        token_share=tuple((counts / tokens).tolist()),
        experts_per_token=total / tokens,
        coefficient_of_variation=counts.std(correction=0).item() * len(shares) / max(total, 1.0),
        dead_share=(counts == 0).double().mean().item(),
        entropy=-sum(p * math.log(p) for p in shares if p > 0) + 0.0,
    )


def _routed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, RoutedLayer]]:
    for name, module in model.named_modules():
        layer: object = module
        if isinstance(layer, RoutedLayer) and layer.num_routed_experts > 0:
            yield name, module, layer


@contextmanager
def count_usage(model: nn.Module) -> Iterator[UsageCounts]:
    """Count the experts a model selects while the block runs it.

    Every module with ``routing`` and ``num_routed_experts > 0`` is watched by a forward pre-hook
    that routes the module's input once more; static layers are left out. The hooks go when the
    block ends.

    Yields:
        The counts; call ``summary()`` when done.
    """
    counts = UsageCounts()
    handles = []
    try:
        for name, module, layer in _routed_layers(model):
            handles.append(counts.watch(name, module, layer))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def expert_usage(
    model: PreTrainedModel, windows_WT: Tensor, *, on_window: Callable[[int], None] | None = None
) -> tuple[LayerUsage, ...]:
    """Expert usage of a converted model on windows of text, one entry per routed layer.

    To count during a pass that runs anyway, use ``count_usage`` around it.

    Args:
        model: the converted model.
        windows_WT: token ids, int64, (W, T).
        on_window: called with the number of windows done.
    """
    with count_usage(model) as counts:
        for window, ids_T in enumerate(windows_WT):
            final_hidden(model, ids_T[None])
            if on_window is not None:
                on_window(window + 1)
    return counts.summary()
