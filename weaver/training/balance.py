"""Load balance without an auxiliary loss: a bias that only the selection of experts sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weaver.kernels.reference import Routing


@runtime_checkable
class RoutedFeedForward(Protocol):
    """Interface of a converted FFN module to training (see ``weaver.models.moe``).

    ``router`` is None for a static layer; otherwise a module with a buffer ``balance_bias``, (E,).
    """

    @property
    def num_routed_experts(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def router(self) -> Any: ...

    temperature: float | None

    def routing(self, x_TD: Tensor) -> Routing | None:
        """The experts of every token; None for a static layer."""
        ...

    def probabilities(self, x_TD: Tensor) -> Tensor:
        """Softmax of the router's scores, (T, E)."""
        ...


def routed_layers(model: nn.Module) -> dict[str, RoutedFeedForward]:
    """The converted FFN modules of a model that route, by module name; static ones are left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedFeedForward) and module.num_routed_experts > 0
    }


def balance_step(load_E: Tensor, target: float, bias_E: Tensor, update: float) -> Tensor:
    """Move the selection bias of every expert toward an equal share of the load.

    b_e <- b_e + update * sign(target - load_e)

    An expert above the target loses ``update``, one below gains it, one exactly there stays.

    Args:
        load_E: tokens that chose each expert in this step, (E,).
        target: load of every expert if all have the same, ``T * K / E``. For top-k that is the mean
            of ``load_E``; for a threshold, where the loads may sum to anything, it also leads the
            mean number of experts per token toward K.
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
    direction_E = torch.sign(target - load_E.to(torch.float64))
    return bias_E + update * direction_E.to(bias_E.dtype)


@dataclass(frozen=True)
class ExpertLoad:
    """Load of one layer's experts: tokens that chose each of them, and tokens in all.

    Args:
        counts_E: tokens that chose each expert, int64, (E,).
        tokens: T.
    """

    counts_E: Tensor
    tokens: int

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(self.counts_E + other.counts_E, self.tokens + other.tokens)


def balance_loss(probabilities_E: Tensor, load: ExpertLoad) -> Tensor:
    """The auxiliary loss of one layer; 1 if all experts are used and likely alike, at most E.

    E * sum_e f_e P_e,    f_e = share of the selections that chose e,    P_e = mean_t p_te

    Gradients flow through P alone.

    Args:
        probabilities_E: P, (E,).
        load: counts of the selections, for f; without any the loss is 0.

    Source: ExpertWeaver, arXiv:2602.15521, continued pretraining; arXiv:2101.03961, equation 4.
    """
    experts = probabilities_E.shape[0]
    shares_E = load.counts_E / load.counts_E.sum().clamp(min=1)
    return experts * (shares_E.to(probabilities_E) * probabilities_E).sum()


@dataclass(frozen=True)
class Balance:
    """How evenly one step used the routed experts of a model.

    Args:
        max_over_mean: largest load of a layer's experts over their mean load, averaged over layers;
            1 if all are equal.
        idle: share of all layers' experts that no token chose.
    """

    max_over_mean: float
    idle: float

    @classmethod
    def of(cls, loads: Mapping[str, ExpertLoad]) -> Self | None:
        """The balance of some layers; None for none, or where no token chose any expert."""
        counts = [load.counts_E.double() for load in loads.values() if int(load.counts_E.sum())]
        if not counts:
            return None
        peaks = [float(counts_E.max() / counts_E.mean()) for counts_E in counts]
        idle = sum(int((load.counts_E == 0).sum()) for load in loads.values())
        experts = sum(load.counts_E.numel() for load in loads.values())
        return cls(sum(peaks) / len(peaks), idle / experts)


class ExpertLoadCounter:
    """Counts the tokens per expert of every routed layer while it is open.

    A forward pre-hook asks ``routing`` for the selection of the module's input. That repeats the
    router (E * D per token), a small part of the FFN, and needs nothing of how ``forward`` works.

    Args:
        model: the model; layers without routed experts are not counted.
        probabilities: keep the mean probabilities of the experts too, with their graph.
    """

    def __init__(self, model: nn.Module, *, probabilities: bool = False) -> None:
        self._layers = routed_layers(model)
        self._keeps_probabilities = probabilities
        self._loads: dict[str, ExpertLoad] = {}
        self._probabilities: dict[str, Tensor] = {}
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

    def take(self) -> dict[str, ExpertLoad]:
        """Loads since the last call by layer name; counting starts again at 0."""
        loads, self._loads = self._loads, {}
        return loads

    def loss(self, loads: Mapping[str, ExpertLoad]) -> Tensor:
        """Mean of ``balance_loss`` over the layers, with the probabilities of the last forward.

        Args:
            loads: of every layer, over all tokens of the batch.
        """
        layers = self._probabilities.items()
        losses = [balance_loss(p_E, loads[name]) for name, p_E in layers]
        return torch.stack(losses).mean()

    def apply(self, loads: Mapping[str, ExpertLoad], update: float) -> None:
        """One ``balance_step`` on the router of every layer that has a load."""
        for name, load in loads.items():
            layer = self._layers[name]
            bias_E = layer.router.balance_bias
            target = load.tokens * layer.top_k / layer.num_routed_experts
            bias_E.copy_(balance_step(load.counts_E, target, bias_E, update))

    def _hook(self, name: str, layer: RoutedFeedForward) -> Callable[..., None]:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TD = inputs[0].reshape(-1, inputs[0].shape[-1])
            if self._keeps_probabilities:
                self._probabilities[name] = layer.probabilities(x_TD).mean(0)
            with torch.no_grad():
                routing = layer.routing(x_TD)
            assert routing is not None
            load = ExpertLoad(routing.counts_E(), routing.num_tokens)
            self._loads[name] = self._loads[name] + load if name in self._loads else load

        return count
