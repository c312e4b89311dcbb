"""Training with all experts: what gives every router a gradient from every expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from weaver.errors import WeaverError
from weaver.training.balance import routed_layers


@contextmanager
def routed_to_all(model: nn.Module, temperature: float | None) -> Iterator[None]:
    """Let every token use all experts while the block runs; see ``reference.route_to_all``.

    Args:
        model: the model.
        temperature: of the softmax over the experts; None changes nothing.
    """
    layers = routed_layers(model).values() if temperature is not None else ()
    for layer in layers:
        layer.temperature = temperature
    try:
        yield
    finally:
        for layer in layers:
            layer.temperature = None


def require_softmax_weights(model: nn.Module) -> None:
    """Check that a model can be routed to all experts.

    Raises:
        WeaverError: the experts of a layer are summands of one FFN with weight 1.
    """
    for name, layer in routed_layers(model).items():
        if layer.router.weighting != "softmax":
            raise WeaverError(
                f"{name}: temperature needs experts with softmax weights",
                why="experts of weight 1 are summands of one FFN: all of them are the dense FFN",
                fix="leave finetune.temperature out, or partition with partition.weighting=softmax",
            )
