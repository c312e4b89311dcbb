"""Interface of export targets: obstacles, the source model, and the stock model made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from weaver.models.converted_folder import ConvertedCheckpoint, ConvertedLayer
from weaver.models.writing import Part

# Experts of the stock model that stand for none of the converted one's.
ALWAYS, NEVER = -1, -2


@dataclass(frozen=True)
class Obstacle:
    """Something that a target cannot hold.

    Args:
        what: the feature, and where it is.
        why: what the target lacks.
        fix: what to run instead.
        approximation: what is exported in its place on request; None if nothing comes close.
    """

    what: str
    why: str
    fix: str
    approximation: str | None = None


@dataclass(frozen=True)
class Source:
    """A converted model and what its calibration kept.

    Args:
        checkpoint: the model.
        inputs: FFN inputs of a layer from the calibration text, (N, D).
        layer: reads an FFN of the model; with approximations where they were asked for.
        dtype: of the exported weights.
    """

    checkpoint: ConvertedCheckpoint
    inputs: Callable[[int], Tensor]
    layer: Callable[[int], ConvertedLayer]
    dtype: torch.dtype


@dataclass(frozen=True)
class StockModel:
    """A converted model as a stock architecture holds it.

    Args:
        config: of the stock architecture.
        parts: its tensors under the names that checkpoints on the hub use.
        experts: per layer the routed expert of the converted model that each expert of the stock
            model is, or ``ALWAYS`` or ``NEVER``.
        router_module: name of the module that selects experts, inside a decoder layer.
        facts: what was chosen, for the record.
    """

    config: PreTrainedConfig
    parts: Sequence[Part]
    experts: Sequence[Sequence[int]]
    router_module: str
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One row of the table of targets.

    Args:
        name: what ``--to`` takes.
        summary: what it is and where it runs, one line.
        obstacles: what it cannot hold of a model, with weights of a dtype.
        build: the model in its form; of models without obstacles, or with approximated layers.
        softmax: it weights the chosen experts by the softmax of their logits.
    """

    name: str
    summary: str
    obstacles: Callable[[ConvertedCheckpoint, torch.dtype], list[Obstacle]]
    build: Callable[[Source], StockModel]
    softmax: bool = False
