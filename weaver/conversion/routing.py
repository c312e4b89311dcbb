"""The router and the compensation of one layer: solved once, by ``partition`` or ``build-router``.

A sequential partition needs both to carry the hidden states past each layer and keeps them;
``build-router`` then takes them over instead of solving them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from weaver.algorithms.glu import GluWeights
from weaver.artifacts.finite import require_finite
from weaver.artifacts.store import write_record
from weaver.artifacts.types import Compensation, ExpertLayout, LayerProfile, Router, Selection
from weaver.config.sections import RouterConfig
from weaver.errors import WeaverError
from weaver.methods.base import MethodSpec
from weaver.methods.compensation import CompensationPlan, solve_compensation
from weaver.methods.registry import get_router
from weaver.rundir.inputs import COMPENSATION_FOLDER, read_compensation, read_router
from weaver.rundir.stage_folders import layer_path


@dataclass(frozen=True)
class RoutedLayer:
    """Router and skip compensation of one converted layer.

    Args:
        router: None for a static layer.
        compensation: None where nothing is compensated.
    """

    router: Router | None
    compensation: Compensation | None


def resolve_router(config: RouterConfig, spec: MethodSpec[Any]) -> RouterConfig:
    """The configuration with the method's defaults filled in; no router kind if it is static.

    Raises:
        WeaverError: no such router, or a refit of experts that overlap.
    """
    if spec.prunes_groups and config.refit:
        raise WeaverError(
            f"a refit of {spec.name}",
            why="its experts overlap: one down projection of the dense FFN cannot be re-solved for "
            "all of them",
            fix="leave --refit out; weaver finetune trains every expert's own rows",
        )
    kind = None if spec.is_static else config.kind or spec.router
    if kind is not None:
        get_router(kind)
    return config.model_copy(
        update={
            "kind": kind,
            "refit": spec.refit if config.refit is None else config.refit,
            "constants": spec.constants if config.constants is None else config.constants,
        }
    )


def require_selection(kind: str, selection: Selection) -> None:
    """Check that a router can select experts the way a layout wants.

    Raises:
        WeaverError: it cannot.
    """
    spec = get_router(kind)
    if selection not in spec.selections:
        raise WeaverError(
            f"router {kind!r} cannot select experts by {selection}",
            why=f"it serves {', '.join(spec.selections)}",
            fix="--router ridge, or --set partition.options.selection=top-k",
        )


def solve_layer(
    weights: GluWeights,
    profile: LayerProfile,
    layout: ExpertLayout,
    config: RouterConfig,
    generator: torch.Generator,
) -> RoutedLayer:
    """Build the router of a layer and solve its compensation.

    Args:
        weights: the dense FFN, float32.
        profile: statistics of the layer's calibration tokens.
        layout: shared and routed neurons.
        config: after ``resolve_router``.
        generator: randomness of the router.

    Raises:
        WeaverError: the router cannot select experts the way the layout wants.
    """
    layout = layout.to(weights.device)
    router: Router | None = None
    if not config.constants:
        layout = replace(layout, expert_bias_ED=None)
    if layout.num_routed_experts and config.kind is not None:
        require_selection(config.kind, layout.selection)
        router = get_router(config.kind).build(weights, profile, layout, generator)
    if not _compensates(layout, config):
        return RoutedLayer(router, None)
    plan = CompensationPlan(
        refit=bool(config.refit), constants=bool(config.constants), shrinkage=config.shrinkage
    )
    return RoutedLayer(router, solve_compensation(weights, profile, layout, router, plan))


def _compensates(layout: ExpertLayout, config: RouterConfig) -> bool:
    if layout.overlap:
        return bool(config.constants) and layout.expert_bias_ED is not None
    return layout.skips and bool(config.refit or config.constants)


def write_routed(folder: Path, layer: int, routed: RoutedLayer) -> None:
    """Write a layer's records.

    Raises:
        WeaverError: a value of the router or the compensation is NaN or infinite.
    """
    for record in (routed.router, routed.compensation):
        if record is not None:
            require_finite(
                record.tensors(),
                f"layer {layer}: {type(record).__name__.lower()}",
                why="the regression has no solution on these tokens",
                fix="more --tokens of other text, --set router.refit=false, or --dtype float32",
            )
    if routed.compensation is not None:
        write_record(layer_path(folder / COMPENSATION_FOLDER, layer), routed.compensation)
    if routed.router is not None:
        write_record(layer_path(folder, layer), routed.router)


def read_routed(folder: Path, layer: int, layout: ExpertLayout) -> RoutedLayer:
    """Inverse of ``write_routed``."""
    return RoutedLayer(read_router(folder, layer, layout), read_compensation(folder, layer))


def routed_paths(
    folder: Path, layer: int, layout: ExpertLayout, config: RouterConfig
) -> list[Path]:
    """The files that ``write_routed`` makes for a layer."""
    paths = []
    if _compensates(layout, config):
        paths.append(layer_path(folder / COMPENSATION_FOLDER, layer))
    if layout.num_routed_experts:
        paths.append(layer_path(folder, layer))
    return paths
