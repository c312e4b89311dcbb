"""How much an error in a layer's FFN output costs at the model's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def output_gradients(
    model: PreTrainedModel,
    ffns: Sequence[nn.Module],
    windows_WT: Tensor,
    generator: torch.Generator,
    on_window: Callable[[int], None],
) -> list[Tensor]:
    """Fisher gradients at the outputs of the FFNs, from one backward pass.

    ``g_t = d/dy_t [-log p(s | text)]`` with ``s`` drawn from the model's own prediction at every
    position of the window, so that ``E[g g^T]`` is the Fisher information of the FFN output.

    Args:
        model: the dense model.
        ffns: its FFN modules, one per layer.
        windows_WT: token ids, (W, T).
        generator: draws the sampled tokens.
        on_window: called with the number of windows done.
    Returns:
        One tensor per layer, (W * T, D), in the model's dtype.
    """
    outputs: list[Tensor] = []
    hooks = [ffn.register_forward_hook(lambda _m, _i, y: outputs.append(y)) for ffn in ffns]
    rows: list[list[Tensor]] = [[] for _ in ffns]
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    try:
        for done, window_T in enumerate(windows_WT, start=1):
            outputs.clear()
            with torch.enable_grad():
                # Some leaf must require a gradient for the graph to exist; the weights need none.
                embedded = embeddings(window_T[None]).requires_grad_()
                logits_TV = model(inputs_embeds=embedded, use_cache=False).logits[0].float()
                logp_TV = logits_TV.log_softmax(-1)
                drawn_T1 = torch.multinomial(logp_TV.detach().exp(), 1, generator=generator)
                loss = -logp_TV.gather(1, drawn_T1).sum()
                gradients = torch.autograd.grad(loss, outputs)
            for row, gradient in zip(rows, gradients, strict=True):
                row.append(gradient[0])
            on_window(done)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(row) for row in rows]


def predicted_kl(error_TD: Tensor, gradient_TD: Tensor) -> float:
    """KL divergence that an error in one FFN's output is predicted to cause, nats per token.

    ``KL ~ 1/2 mean_t (g_t . e_t)^2``: second order in the error, errors of different tokens taken
    as independent.

    Args:
        error_TD: converted output less dense output, (T, D).
        gradient_TD: ``output_gradients`` at the same tokens, (T, D).
    """
    projected_T = (error_TD.float() * gradient_TD.float()).sum(1)
    return 0.5 * float(projected_T.square().mean())
