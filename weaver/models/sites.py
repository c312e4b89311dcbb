"""Sites: the GLU FFNs of a model, one by one; what every stage loops over.

A dense layer has one site, its FFN. A Mixture-of-Experts layer has one per routed expert and, where
the model has one, its own shared expert. Sites are numbered through the model: layer by layer, the
experts of a layer in their order, the shared expert last, which is also the order of the modules in
a converted model. The number of a site names its files; in a dense model it is that of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weaver.models.accounting import LayerShape


@dataclass(frozen=True)
class Site:
    """One GLU FFN of a model.

    Args:
        number: counted from 0 through the model.
        layer: the decoder layer.
        expert: the routed expert of a MoE layer; None for another FFN.
        shared: whether it is the shared expert of a MoE layer.
    """

    number: int
    layer: int
    expert: int | None = None
    shared: bool = False

    @property
    def is_inner(self) -> bool:
        """Whether it is part of a Mixture of Experts."""
        return self.shared or self.expert is not None

    @property
    def part(self) -> str | None:
        """ "expert 3" or "shared expert"; None for the whole FFN of a layer."""
        if self.expert is not None:
            return f"expert {self.expert}"
        return "shared expert" if self.shared else None


@dataclass(frozen=True)
class TwoLevelShape:
    """Shape of a MoE layer whose experts are split again; its entry in ``config.json``.

    Args:
        experts: shape of every routed expert of the outer level.
        shared: that of the outer level's shared expert; None without one.
        outer: shape of the outer level, where weaver made it; None for a stock architecture, whose
            configuration holds it.
    """

    experts: tuple[LayerShape, ...]
    shared: LayerShape | None = None
    outer: LayerShape | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "experts": [shape.to_dict() for shape in self.experts],
            "shared": None if self.shared is None else self.shared.to_dict(),
            "outer": None if self.outer is None else self.outer.to_dict(),
        }

    @property
    def sites(self) -> list[LayerShape]:
        """Shapes in the order of the sites."""
        return [*self.experts, *([] if self.shared is None else [self.shared])]


AnyShape = LayerShape | TwoLevelShape


def read_shape(entry: Mapping[str, Any]) -> AnyShape:
    """Inverse of ``to_dict``: the shape of a converted layer from its entry in ``config.json``."""
    if "experts" not in entry:
        return LayerShape(**entry)
    return TwoLevelShape(
        tuple(LayerShape(**expert) for expert in entry["experts"]),
        None if entry["shared"] is None else LayerShape(**entry["shared"]),
        None if entry["outer"] is None else LayerShape(**entry["outer"]),
    )


def site_shapes(layers: Sequence[AnyShape]) -> list[LayerShape]:
    """Shapes of all sites of a model, in their order."""
    return [
        shape
        for layer in layers
        for shape in (layer.sites if isinstance(layer, TwoLevelShape) else [layer])
    ]


def layer_shapes(
    sites: Sequence[Site], shapes: Sequence[LayerShape], outer: Mapping[int, LayerShape]
) -> list[AnyShape]:
    """Shapes of all layers, from those of their sites.

    Args:
        sites: of the model, in their order.
        shapes: of every site.
        outer: shapes of the outer levels that weaver made, by layer.
    """
    layers: dict[int, list[tuple[Site, LayerShape]]] = {}
    for site, shape in zip(sites, shapes, strict=True):
        layers.setdefault(site.layer, []).append((site, shape))
    return [_layer_shape(members, outer.get(layer)) for layer, members in layers.items()]


def _layer_shape(members: list[tuple[Site, LayerShape]], outer: LayerShape | None) -> AnyShape:
    if not members[0][0].is_inner:
        return members[0][1]
    experts = tuple(shape for site, shape in members if not site.shared)
    shared = [shape for site, shape in members if site.shared]
    return TwoLevelShape(experts, shared[0] if shared else None, outer)


def number_sites(experts: Sequence[int | None], shared: Sequence[bool]) -> Iterator[Site]:
    """The sites of a model.

    Args:
        experts: routed experts of every layer; None where the layer's FFN is one site.
        shared: whether a MoE layer has a shared expert of its own.
    """
    number = 0
    for layer, (count, has_shared) in enumerate(zip(experts, shared, strict=True)):
        if count is None:
            yield Site(number, layer)
            number += 1
            continue
        for expert in range(count):
            yield Site(number + expert, layer, expert)
        number += count
        if has_shared:
            yield Site(number, layer, shared=True)
            number += 1
