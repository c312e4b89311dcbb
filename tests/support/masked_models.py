"""Reference for partial conversions, independent of the kernels: dense FFNs with masked neurons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tiny_conversions import Conversion
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from weaver.algorithms.glu import ACTIVATIONS, GluWeights, glu_hidden
from weaver.artifacts.types import ExpertLayout, Router
from weaver.models.checkpoint import Checkpoint


class MaskedFfn(nn.Module):
    """The dense FFN with the neurons of the skipped experts set to zero, token by token."""

    def __init__(self, weights: GluWeights, layout: ExpertLayout, router: Router | None) -> None:
        super().__init__()
        self.weights, self.layout, self.router = weights, layout, router

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        factors_TF = torch.zeros(len(x_TD), self.layout.intermediate_size)
        factors_TF[:, self.layout.shared_S] = 1.0
        for token, x_D in enumerate(x_TD):
            for expert, factor in self._chosen(x_D):
                # Experts may have neurons in common.
                factors_TF[token, self.layout.experts_EN[expert]] += factor
        y_TD = (glu_hidden(x_TD, self.weights) * factors_TF) @ self.weights.down_FD
        for bias_D in (self.weights.output_bias_D, self.layout.output_bias_D):
            y_TD = y_TD if bias_D is None else y_TD + bias_D
        return y_TD.view_as(hidden_states)

    def _chosen(self, x_D: Tensor) -> list[tuple[int, float]]:
        if self.router is None:
            return []
        score_E = self.router.weight_ED @ x_D
        if self.router.up_weight_ED is not None:
            act = ACTIVATIONS[self.weights.activation]
            score_E = ((self.router.up_weight_ED @ x_D) * act(score_E)).abs()
        if self.router.bias_E is not None:
            score_E = score_E + self.router.bias_E
        probability_E = score_E.softmax(0)
        order = (probability_E + self.router.balance_bias_E).argsort(descending=True)
        chosen = order[: self.layout.top_k].tolist()
        if self.layout.selection == "threshold":
            pairs = zip(score_E, self.router.balance_bias_E, strict=True)
            chosen = [e for e, (score, bias) in enumerate(pairs) if score > -bias]
        if self.layout.weighting == "softmax":
            share_E = self.layout.routed_scaling * probability_E / probability_E[chosen].sum()
            return [(e, float(share_E[e])) for e in chosen]
        return [(e, float(1 + probability_E[e] * self.router.scale_E[e])) for e in chosen]


def masked_model(
    variant: str, checkpoint: Checkpoint, conversions: Sequence[Conversion]
) -> PreTrainedModel:
    """The dense model with every FFN masked: what a partial conversion means."""
    model = tiny_model(variant)
    for layer, (layout, router) in enumerate(conversions):
        decoder_layer = model.get_submodule(f"model.layers.{layer}")
        decoder_layer.mlp = MaskedFfn(checkpoint.ffn(layer, torch.float32), layout, router)
    return model
