"""Names of the FFNs in a checkpoint: per layer, per expert, or as rows that weaver permuted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedConfig

from weaver.algorithms.glu import GluWeights
from weaver.models.accounting import LayerShape
from weaver.models.families import Family
from weaver.models.sites import Site, TwoLevelShape, number_sites, read_shape


class Tensors(Protocol):
    """Interface of a checkpoint whose FFNs are read: tensors, config, family and activation."""

    config: PreTrainedConfig
    family: Family
    activation: str

    def has(self, name: str) -> bool: ...
    def tensor(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> list[int]: ...


class Ffns(ABC):
    """The sites of a checkpoint and their weights."""

    def __init__(self, source: Tensors) -> None:
        self.source = source
        self.family = source.family

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every FFN of the model."""
        layers = range(int(self.source.config.num_hidden_layers))
        return tuple(
            number_sites(
                [self.num_experts(layer) for layer in layers],
                [self.has_shared(layer) for layer in layers],
            )
        )

    @cached_property
    def inner_layers(self) -> frozenset[int]:
        """Layers that are a Mixture of Experts."""
        return frozenset(site.layer for site in self.sites if site.is_inner)

    @abstractmethod
    def num_experts(self, layer: int) -> int | None:
        """Routed experts of a layer; None where its FFN is one site."""

    @abstractmethod
    def has_shared(self, layer: int) -> bool:
        """Whether a MoE layer has a shared expert."""

    @abstractmethod
    def share(self, site: Site) -> float:
        """Share of the tokens that reach an FFN, for an expert that at equal load: K / E.

        Where the outer level selects by a threshold, K is the intended mean.
        """

    @abstractmethod
    def weights(self, site: Site) -> GluWeights:
        """One FFN, neuron j in row j of every matrix, as it is stored."""

    @abstractmethod
    def dense_shape(self, site: Site) -> LayerShape:
        """Size and biases of an FFN, all of its neurons shared."""

    @abstractmethod
    def expected_shapes(self, site: Site, hidden_size: int) -> dict[str, list[int]]:
        """Shapes that the matrices of an FFN have, by tensor name."""

    @abstractmethod
    def owns(self, layer: int, name: str) -> bool:
        """Whether a tensor, by its name inside the FFN of a layer, belongs to one of the sites."""

    @property
    @abstractmethod
    def outer(self) -> Mapping[int, LayerShape]:
        """Shapes of the outer levels that weaver made, by layer."""

    @abstractmethod
    def gate_name(self, site: Site) -> str:
        """The tensor that holds the gate projection."""

    def prefix(self, layer: int) -> str:
        """Prefix of the tensors of a layer's FFN."""
        return f"{self.family.layers}.{layer}.{self.family.ffn}."


def site_prefix(family: Family, site: Site) -> str:
    """Prefix of a site's tensors, and its module, in a stock or a converted model."""
    prefix = f"{family.layers}.{site.layer}.{family.ffn}."
    if site.expert is not None:
        return f"{prefix}experts.{site.expert}."
    return f"{prefix}{family.shared}." if site.shared else prefix


class StockFfns(Ffns):
    """FFNs as transformers' checkpoints hold them: every projection is a tensor."""

    def __init__(self, source: Tensors) -> None:
        super().__init__(source)
        # Read once: a model may have thousands of FFNs.
        self._experts: dict[int, int | None] = {}
        self._shapes: dict[tuple[int, bool, bool], LayerShape] = {}

    def num_experts(self, layer: int) -> int | None:
        if layer not in self._experts:
            # By the router, so that an expert that the checkpoint lacks is missed.
            router = f"{self.prefix(layer)}gate.weight"
            rows = self.source.shape(router)[0] if self.source.has(router) else None
            self._experts[layer] = rows
        return self._experts[layer]

    def has_shared(self, layer: int) -> bool:
        return self.source.has(
            f"{self.prefix(layer)}{self.family.shared}.{self.family.gate}.weight"
        )

    def share(self, site: Site) -> float:
        experts = None if site.expert is None else self.num_experts(site.layer)
        return int(self.source.config.num_experts_per_tok) / experts if experts else 1.0

    def weights(self, site: Site) -> GluWeights:
        gate_FD, gate_bias = self._projection(site, self.family.gate)
        up_FD, up_bias = self._projection(site, self.family.up)
        if self.family.fused:
            gate_FD, up_FD = gate_FD.chunk(2)[0], up_FD.chunk(2)[1]
            gate_bias = None if gate_bias is None else gate_bias.chunk(2)[0]
            up_bias = None if up_bias is None else up_bias.chunk(2)[1]
        down_DF, output_bias = self._projection(site, self.family.down)
        return GluWeights(
            gate_FD=gate_FD.contiguous(),
            up_FD=up_FD.contiguous(),
            down_FD=down_DF.T.contiguous(),
            activation=self.source.activation,
            gate_bias_F=gate_bias,
            up_bias_F=up_bias,
            output_bias_D=output_bias,
        )

    def dense_shape(self, site: Site) -> LayerShape:
        # All experts of a layer are of one shape.
        key = (site.layer, site.expert is not None, site.shared)
        if key not in self._shapes:
            prefix = site_prefix(self.family, site)
            rows = self.source.shape(f"{prefix}{self.family.gate}.weight")[0]
            self._shapes[key] = LayerShape(
                num_shared_neurons=rows // 2 if self.family.fused else rows,
                gate_bias=self.source.has(f"{prefix}{self.family.gate}.bias"),
                up_bias=self.source.has(f"{prefix}{self.family.up}.bias"),
                output_bias=self.source.has(f"{prefix}{self.family.down}.bias"),
            )
        return self._shapes[key]

    def expected_shapes(self, site: Site, hidden_size: int) -> dict[str, list[int]]:
        neurons = self._neurons(site)
        rows = 2 * neurons if self.family.fused else neurons
        prefix = site_prefix(self.family, site)
        return {
            f"{prefix}{self.family.gate}.weight": [rows, hidden_size],
            f"{prefix}{self.family.up}.weight": [rows, hidden_size],
            f"{prefix}{self.family.down}.weight": [hidden_size, neurons],
        }

    def _neurons(self, site: Site) -> int:
        """F of a layer by the configuration; of an expert, which each family calls its own, by its
        gate projection."""
        if site.is_inner:
            return self.dense_shape(site).num_shared_neurons
        return int(self.source.config.intermediate_size)

    def owns(self, layer: int, name: str) -> bool:
        inner = name.split(".", maxsplit=1)[0] in ("experts", self.family.shared)
        return inner or layer not in self.inner_layers

    @property
    def outer(self) -> Mapping[int, LayerShape]:
        return {}

    def gate_name(self, site: Site) -> str:
        return f"{site_prefix(self.family, site)}{self.family.gate}.weight"

    def _projection(self, site: Site, part: str) -> tuple[Tensor, Tensor | None]:
        name = f"{site_prefix(self.family, site)}{part}"
        bias = f"{name}.bias"
        return (
            self.source.tensor(f"{name}.weight"),
            self.source.tensor(bias) if self.source.has(bias) else None,
        )


class SplitFfns(Ffns):
    """FFNs that weaver split before: experts are rows, see ``MoEFeedForward``."""

    def __init__(self, source: Tensors) -> None:
        super().__init__(source)
        self._shapes: list[LayerShape] = []
        for entry in source.config.weaver["layers"]:
            shape = read_shape(entry)
            assert not isinstance(shape, TwoLevelShape), "refused when the checkpoint was opened"
            self._shapes.append(shape)

    def num_experts(self, layer: int) -> int | None:
        return self._shapes[layer].n_routed_experts or None

    def has_shared(self, layer: int) -> bool:
        return self._shapes[layer].num_shared_neurons > 0

    def share(self, site: Site) -> float:
        shape = self._shapes[site.layer]
        return 1.0 if site.expert is None else shape.num_experts_per_tok / shape.n_routed_experts

    def weights(self, site: Site) -> GluWeights:
        shape, prefix = self._shapes[site.layer], self.prefix(site.layer)

        def stored(name: str) -> Tensor | None:
            name = f"{prefix}{name}"
            return self.source.tensor(name) if self.source.has(name) else None

        whole = GluWeights(
            gate_FD=self.source.tensor(f"{prefix}gate_weight"),
            up_FD=self.source.tensor(f"{prefix}up_weight"),
            down_FD=self.source.tensor(f"{prefix}down_weight"),
            activation=self.source.activation,
            gate_bias_F=stored("gate_bias"),
            up_bias_F=stored("up_bias"),
            output_bias_D=None if site.is_inner else stored("output_bias"),
        )
        if not site.is_inner:
            return whole
        if site.expert is None:
            return whole.rows(0, shape.num_shared_neurons)
        begin = shape.num_shared_neurons + site.expert * shape.moe_intermediate_size
        rows = whole.rows(begin, begin + shape.moe_intermediate_size)
        bias_ED = stored("expert_bias")
        # The constant of an expert is the output bias of an FFN of its own.
        return rows if bias_ED is None else replace(rows, output_bias_D=bias_ED[site.expert])

    def dense_shape(self, site: Site) -> LayerShape:
        shape = self._shapes[site.layer]
        routed = site.expert is not None
        return LayerShape(
            num_shared_neurons=shape.moe_intermediate_size if routed else shape.num_shared_neurons,
            gate_bias=shape.gate_bias,
            up_bias=shape.up_bias,
            output_bias=shape.expert_bias if routed else shape.output_bias and not site.is_inner,
        )

    def expected_shapes(self, site: Site, hidden_size: int) -> dict[str, list[int]]:
        shape, prefix = self._shapes[site.layer], self.prefix(site.layer)
        neurons = shape.num_shared_neurons + shape.n_routed_experts * shape.moe_intermediate_size
        parts = ("gate_weight", "up_weight", "down_weight")
        return {f"{prefix}{part}": [neurons, hidden_size] for part in parts}

    def owns(self, layer: int, name: str) -> bool:
        outer = name.startswith("router.") or name == "output_bias"
        return not outer or layer not in self.inner_layers

    @property
    def outer(self) -> Mapping[int, LayerShape]:
        return {layer: self._shapes[layer] for layer in self.inner_layers}

    def gate_name(self, site: Site) -> str:
        return f"{self.prefix(site.layer)}gate_weight"
