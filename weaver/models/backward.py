"""A backward pass through a decoder with one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from weaver.models.device import CPU
from weaver.models.output_head import chunk_tokens, project
from weaver.models.stream import DecoderStream, DenseFfn


@dataclass(frozen=True)
class FfnGradients:
    """Holds one FFN's inputs and outputs, and the gradient of a loss with respect to the outputs.

    Args:
        layer: index of the layer.
        inputs_TD: FFN inputs x of all windows, one after the other, (W * T, D).
        outputs_TD: FFN outputs y, (W * T, D).
        gradients_TD: gradient of the loss with respect to y, (W * T, D).
    """

    layer: int
    inputs_TD: Tensor
    outputs_TD: Tensor
    gradients_TD: Tensor


def fisher_gradients(
    stream: DecoderStream,
    folder: Path,
    generator: torch.Generator,
    on_layer: Callable[[int], None],
) -> Iterator[FfnGradients]:
    """Fisher gradients at the outputs of a dense model's FFNs, from the last layer to the first.

    ``g_t = d/dy_t [-log p(s | text)]`` with ``s`` drawn from the model's own prediction at every
    position of a window, so that ``E[g g^T]`` is the Fisher information of the FFN output.

    The forward pass keeps the inputs of every layer, (L, W, T, D) in the stream's dtype; the
    backward pass computes each layer once more from them.

    Args:
        stream: the dense model and its windows.
        folder: for hidden states that outgrow main memory.
        generator: draws the sampled tokens, on the stream's device.
        on_layer: called with a layer's index after either pass over it.
    """
    checkpoint, dtype = stream.checkpoint, stream.dtype
    hidden_WTD = stream.embed(folder)
    inputs_LWTD = hidden_WTD.new_empty(checkpoint.num_layers, *hidden_WTD.shape)
    for layer, inputs_WTD in enumerate(inputs_LWTD):
        inputs_WTD.copy_(hidden_WTD)
        stream.run(layer, DenseFfn(checkpoint.ffn(layer, dtype)), hidden_WTD, write=True)
        on_layer(layer)
    gradient_WTD = _loss_gradients(stream, hidden_WTD, generator)
    for layer in reversed(range(checkpoint.num_layers)):
        yield _through(stream, layer, inputs_LWTD[layer], gradient_WTD)
        on_layer(layer)


def _loss_gradients(
    stream: DecoderStream, hidden_WTD: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of the loss with respect to the last layer's outputs, (W, T, D)."""
    model = stream.load_head()
    gradient_WTD = torch.empty_like(hidden_WTD)
    for window, last_TD in enumerate(hidden_WTD):
        with torch.enable_grad():
            last_BTD = last_TD[None].to(stream.device).detach().requires_grad_()
            normed_BTD = stream.normalise(last_BTD)
        rows = []
        for part_ND in normed_BTD[0].detach().split(chunk_tokens(model)):
            with torch.enable_grad():
                part_ND.requires_grad_()
                logp_NV = project(model, part_ND).log_softmax(-1)
                drawn_N1 = torch.multinomial(logp_NV.detach().exp(), 1, generator=generator)
                loss = -logp_NV.gather(1, drawn_N1).sum()
            rows += torch.autograd.grad(loss, part_ND)
        (gradient_BTD,) = torch.autograd.grad(normed_BTD, last_BTD, torch.cat(rows)[None])
        gradient_WTD[window] = gradient_BTD[0]
    return gradient_WTD


def _through(
    stream: DecoderStream, layer: int, inputs_WTD: Tensor, gradient_WTD: Tensor
) -> FfnGradients:
    """Take the gradient from a layer's outputs to its inputs, in place."""
    ffn = _Kept(DenseFfn(stream.checkpoint.ffn(layer, stream.dtype)))
    module = stream.layer(layer, ffn).requires_grad_(False)
    inputs, outputs, gradients = [], [], []
    for shown_BTD, back_BTD in zip(
        stream.batches(inputs_WTD), stream.batches(gradient_WTD), strict=True
    ):
        with torch.enable_grad():
            x_BTD = shown_BTD.to(stream.device).detach().requires_grad_()
            output_BTD = stream.apply(module, layer, x_BTD)
        wanted = (x_BTD, ffn.output)
        at_input_BTD, at_ffn_BTD = torch.autograd.grad(
            output_BTD, wanted, back_BTD.to(stream.device)
        )
        inputs.append(ffn.input.detach().flatten(0, -2))
        outputs.append(ffn.output.detach().flatten(0, -2))
        # A copy: where the output is a sum, its gradient is that of the layer's output itself.
        gradients.append(at_ffn_BTD.flatten(0, -2).clone())
        back_BTD.copy_(at_input_BTD)
    return FfnGradients(layer, torch.cat(inputs), torch.cat(outputs), torch.cat(gradients))


class _Kept(nn.Module):
    """An FFN whose last input and output are kept, with the graph between them."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn
        self.input = self.output = torch.empty(0, device=CPU)

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.input = hidden_states
        self.output = self.ffn(hidden_states)
        return self.output
