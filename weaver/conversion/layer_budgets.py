"""How many neurons of every layer stay active: the allocations of ``partition``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weaver.algorithms.energy import centred_energy
from weaver.artifacts.store import read_json, write_json
from weaver.conversion.splitter import LayerSplitter
from weaver.conversion.trials import Trial, try_layers
from weaver.errors import WeaverError
from weaver.methods.allocation import adaptive_active_neurons
from weaver.methods.registry import get_router
from weaver.methods.slice_budgets import ErrorCurve, allocate_slices
from weaver.models.accounting import LayerShape
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.stage_run import StageContext

BUDGET_FILE = "budget.json"

# Active slices at which a layer is tried, as multiples of the uniform number.
TRIAL_SHARES = (0.6, 1.0, 1.4)

# A static method's neurons are given out in this many slices.
STATIC_SLICES = 64


@dataclass(frozen=True)
class Budget:
    """Active neurons of every layer, and the predicted KL beside that of equal layers.

    Args:
        active_neurons: A of each layer.
        predicted_kl: sum of the layers' predicted KL; None where nothing was predicted.
        uniform_kl: the same sum with equal layers.
    """

    active_neurons: list[int]
    predicted_kl: float | None = None
    uniform_kl: float | None = None


def allocate(context: StageContext, folder: Path, splitter: LayerSplitter) -> Budget:
    """Active neurons of every layer, by the configured allocation.

    ``fisher`` tries every layer alone at several sizes: it is split, routed and compensated from
    some calibration tokens, and its error on others is weighted by the Fisher gradients there
    (``predicted_kl``). The sizes with the least total under one budget of FLOPs, routers counted
    in, are found on the convex hulls of these curves.

    Args:
        context: progress, seed.
        folder: of the partition stage; what ``fisher`` found is kept there.
        splitter: method and configuration.

    Raises:
        WeaverError: another allocation than ``uniform`` for a model that has experts already.
    """
    config, checkpoint = splitter.config, splitter.checkpoint
    if config.allocation == "uniform":
        return Budget([splitter.uniform(site) for site in range(checkpoint.num_sites)])
    refuse_experts(checkpoint, f"--allocation {config.allocation}", "--allocation uniform")
    if config.allocation == "adaptive":
        scores = [
            centred_energy(
                splitter.calibration.profile(layer).hidden_variance_F,
                checkpoint.ffn(layer, torch.float32).down_FD,
            )
            for layer in range(checkpoint.num_layers)
        ]
        widths = splitter.num_experts, splitter.width
        return Budget(adaptive_active_neurons(scores, *widths, config.sparsity))
    path = folder / BUDGET_FILE
    if not path.exists():
        slices = Slices.of(splitter)
        curves = measure_curves(context, splitter, slices)
        write_json(path, _divided(curves, slices, config.sparsity, splitter.uniform_neurons))
    found = read_json(path, rebuild="weaver partition --force")
    return Budget(found["active_neurons"], found["predicted_kl"], found["uniform_kl"])


def predicted_layer_kl(folder: Path) -> tuple[float, ...] | None:
    """The KL that each layer was predicted to cause; None unless the allocation was ``fisher``.

    Args:
        folder: of the partition stage.
    """
    path = folder / BUDGET_FILE
    if not path.exists():
        return None
    values = read_json(path, rebuild="weaver partition --force").get("layer_kl")
    return None if values is None else tuple(values)


def refuse_experts(checkpoint: Checkpoint, what: str, fix: str) -> None:
    """Refuse what compares the layers of a dense model with each other.

    Raises:
        WeaverError: the model is a Mixture of Experts already.
    """
    if checkpoint.is_moe:
        raise WeaverError(
            f"{what} of a Mixture-of-Experts model",
            why="it weighs FFNs that are of one size and see the same tokens against each other; "
            "experts see their own",
            fix=fix,
        )


@dataclass(frozen=True)
class Slices:
    """The pieces in which a layer's neurons are given out.

    Args:
        neurons: F.
        count: slices of a layer: Ne, or ``STATIC_SLICES`` of a static method.
        width: neurons of a slice.
        router_rows: rows of the router, in which a routed layer costs extra.
    """

    neurons: int
    count: int
    width: int
    router_rows: int

    @classmethod
    def of(cls, splitter: LayerSplitter) -> Slices:
        """The slices of a method."""
        neurons, experts = splitter.checkpoint.intermediate_size, splitter.num_experts
        if experts:
            assert splitter.settings.router.kind is not None
            kind = get_router(splitter.settings.router.kind).kind
            router_rows = LayerShape(0, experts, splitter.width, 1, kind).router_rows
            return cls(neurons, experts, splitter.width, router_rows)
        count = min(STATIC_SLICES, neurons)
        return cls(neurons, count, neurons // count, 0)

    @property
    def leftover(self) -> int:
        """Neurons that no slice holds; they are always active."""
        return self.neurons - self.count * self.width

    def active(self, slices: int) -> int:
        """Neurons that so many active slices make."""
        return self.leftover + slices * self.width

    def trials(self, sparsity: float) -> tuple[int, ...]:
        """Numbers of active slices at which a layer is tried."""
        low = 2 if self.router_rows and self.count > 2 else 1
        uniform = self.count * (1.0 - sparsity)
        sizes = {max(low, round(uniform * share)) for share in TRIAL_SHARES}
        return tuple(sorted(size for size in sizes if size < self.count))


def measure_curves(
    context: StageContext, splitter: LayerSplitter, slices: Slices
) -> list[ErrorCurve]:
    """Error curve of every layer, see ``allocate``."""
    trial = Trial.prepare(context, splitter.calibration)
    sizes = slices.trials(splitter.config.sparsity)
    active = [slices.active(size) for size in sizes]
    return [
        ErrorCurve(sizes, tuple(tried.predicted_kl for tried in row), slices.count)
        for row in try_layers(context, splitter, trial, active, "partition: budgets")
    ]


def _divided(
    curves: Sequence[ErrorCurve], slices: Slices, sparsity: float, uniform: int
) -> dict[str, Any]:
    """Divide the budget among the layers by their error curves, as values for ``budget.json``."""
    # In rows of 2 D FLOPs: three per neuron, one per expert of a router.
    budget = 3.0 * len(curves) * (slices.neurons * (1.0 - sparsity) - slices.leftover)
    chosen = allocate_slices(curves, 3.0 * slices.width, slices.router_rows, budget)
    equal = (uniform - slices.leftover) // slices.width
    return {
        "active_neurons": [slices.active(count) for count in chosen],
        "predicted_kl": sum(c.at(n) for c, n in zip(curves, chosen, strict=True)),
        "uniform_kl": sum(c.at(equal) for c in curves),
        "layer_kl": [c.at(n) for c, n in zip(curves, chosen, strict=True)],
        "num_slices": slices.count,
        "trials": [list(curve.slices) for curve in curves],
        "kl": [list(curve.kl) for curve in curves],
    }
