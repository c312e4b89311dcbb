"""The settings of a partition with the defaults of its method, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weaver.config.sections import PartitionConfig, RouterConfig
from weaver.conversion.routing import require_selection, resolve_router
from weaver.errors import WeaverError
from weaver.methods.base import MethodOptions, MethodSpec
from weaver.methods.registry import get_method, resolve_options


@dataclass(frozen=True)
class PartitionSettings:
    """How FFNs are split, every default filled in.

    Args:
        config: the section.
        router: of the layers in front of the one that a sequential partition splits.
        spec: the method.
        options: its options.
    """

    config: PartitionConfig
    router: RouterConfig
    spec: MethodSpec[Any]
    options: MethodOptions

    def recorded(self) -> dict[str, Any]:
        """The settings as the manifest keeps them."""
        # Softmax weights are left out where they are off.
        exclude = {"weighting"} if self.config.weighting is None else None
        values = self.config.model_dump(mode="json", exclude=exclude)
        return {**values, "propagate": self.router.model_dump(mode="json")}


def recorded_settings(values: Mapping[str, Any]) -> PartitionSettings:
    """The settings that a manifest keeps; see ``PartitionSettings.recorded``."""
    own = {key: value for key, value in values.items() if key != "propagate"}
    return resolve_settings(
        PartitionConfig.model_validate(own), RouterConfig.model_validate(values["propagate"])
    )


def resolve_settings(config: PartitionConfig, router: RouterConfig) -> PartitionSettings:
    """Fill in the method's defaults.

    Args:
        config: method, sparsity, experts.
        router: the configuration's section: layers are split behind layers that route as the
            converted model will.

    Raises:
        WeaverError: unknown method, options or router, a router that cannot select experts as the
            method's options want, or an allocation that the method does not have.
    """
    spec = get_method(config.method)
    options = resolve_options(spec, config.options)
    if spec.prunes_groups and (config.allocation or spec.allocation) != "uniform":
        raise WeaverError(
            f"{spec.name} with --allocation {config.allocation}",
            why="its experts are prunings of the whole FFN, of the same width in every layer",
            fix="--allocation uniform",
        )
    if spec.is_static and config.num_experts is not None:
        raise WeaverError(
            f"{spec.name} with {config.num_experts} experts",
            why="it is a static method: every token runs the same neurons, there are no experts",
            fix="leave --num-experts out, or choose a routed method such as weave",
        )
    resolved = resolve_router(router, spec)
    if resolved.kind is not None:
        require_selection(resolved.kind, options.selects)
    _check_weighting(config, resolved, spec, options)
    values = {
        "num_experts": None if spec.is_static else config.num_experts or spec.num_experts,
        "allocation": config.allocation or spec.allocation,
        "sequential": spec.sequential if config.sequential is None else config.sequential,
        "options": options.model_dump(mode="json"),
    }
    return PartitionSettings(config.model_copy(update=values), resolved, spec, options)


def _check_weighting(
    config: PartitionConfig, router: RouterConfig, spec: MethodSpec[Any], options: MethodOptions
) -> None:
    if config.weighting is None:
        return
    if spec.is_static or spec.prunes_groups:
        raise WeaverError(
            f"partition.weighting={config.weighting} of {spec.name}",
            why="its experts are weighted in one way only" if spec.prunes_groups else "it has none",
            fix="leave partition.weighting out",
        )
    if options.selects != "top-k":
        raise WeaverError(
            "softmax weights of experts that are selected by a threshold",
            why="a threshold may select nothing, and the weights of nothing have no sum",
            fix="--set partition.options.selection=top-k",
        )
    if router.refit or router.constants:
        raise WeaverError(
            "softmax weights with a refit or constants",
            why="both are solved for experts of weight 1",
            fix="--no-refit --set router.constants=false",
        )
