"""Load balance without an auxiliary loss: a bias that only the selection of experts sees."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@runtime_checkable
class RoutedFeedForward(Protocol):
    """What training needs to know of a converted FFN module (see ``weaver.models.moe``).

    ``router`` is None for a static layer; otherwise a module with a buffer ``balance_bias``, (E,).
    """

    @property
    def num_routed_experts(self) -> int: ...

    @property
    def router(self) -> Any: ...

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids, int64, (T, K), and their output weights, (T, K)."""
        ...


def routed_layers(model: nn.Module) -> dict[str, RoutedFeedForward]:
    """The converted FFN modules of a model that route, by module name; static ones are left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedFeedForward) and module.num_routed_experts > 0
    }


def balance_step(load_E: Tensor, bias_E: Tensor, update: float) -> Tensor:
    """Move the selection bias of every expert toward equal load.

    b_e <- b_e + update * sign(mean(load) - load_e)

    An expert above the mean load of the step loses ``update``, one below gains it, one exactly at
    the mean stays.

    Args:
        load_E: tokens that chose each expert in this step, (E,).
        bias_E: the bias before the step, (E,).
        update: size of the step, not negative.

    Returns:
        The bias after the step, in the dtype of ``bias_E``, (E,).

    Raises:
        ValueError: shapes differ, or ``update`` is negative.

    Source: CMoE, arXiv:2502.04416, load-balanced fine-tuning; after arXiv:2408.15664, algorithm 1.
    """
    if load_E.shape != bias_E.shape:
        raise ValueError(f"load {tuple(load_E.shape)} and bias {tuple(bias_E.shape)} differ")
    if update < 0:
        raise ValueError(f"update={update} must not be negative")
    load_E = load_E.to(torch.float64)
    direction_E = torch.sign(load_E.mean() - load_E)
    return bias_E + update * direction_E.to(bias_E.dtype)


class ExpertLoadCounter:
    """Counts the tokens per expert of every routed layer while it is open.

    A forward pre-hook asks ``route`` for the selection of the module's input. That repeats the
    router (E * D per token), a small part of the FFN, and needs nothing of how ``forward`` works.

    Args:
        model: the model; layers without routed experts are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = routed_layers(model)
        self._loads: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            assert isinstance(layer, nn.Module)
            self._handles.append(layer.register_forward_pre_hook(self._hook(name, layer)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> dict[str, Tensor]:
        """Loads since the last call, int64, (E,) per layer name; counting starts again at 0."""
        loads, self._loads = self._loads, {}
        return loads

    def apply(self, update: float) -> None:
        """One ``balance_step`` on the router of every layer that was used since the last call."""
        for name, load_E in self.take().items():
            bias_E = self._layers[name].router.balance_bias
            bias_E.copy_(balance_step(load_E, bias_E, update))

    def _hook(self, name: str, layer: RoutedFeedForward) -> Callable[..., None]:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
                ids_TK, _ = layer.route(x_TD)
            load_E = self._loads.setdefault(
                name, ids_TK.new_zeros(layer.num_routed_experts, dtype=torch.int64)
            )
            ids = ids_TK.reshape(-1)
            load_E.scatter_add_(0, ids, torch.ones_like(ids))

        return count
