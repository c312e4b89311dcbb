"""Squared norms of expert contributions to a layer's output, and squared errors of each expert."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens whose neuron activations are regrouped by expert at once.
_CHUNK_TOKENS = 2048


def expert_contributions(
    hidden_TF: Tensor, down_FD: Tensor, experts_EN: Tensor, bias_ED: Tensor | None = None
) -> Tensor:
    """Squared norm of what each expert adds to the output, ``||h_e Wd_e + b_e||^2``, (T, E).

    Computed through the Gram matrices ``Wd_e Wd_e^T`` (N, N): outputs (T, E, D) never exist.

    Args:
        hidden_TF: neuron activations h, (T, F); subtract their mean for centred contributions.
        down_FD: down projection, (F, D).
        experts_EN: neuron ids of each expert, (E, N).
        bias_ED: constants that come with an expert's output, (E, D).
    """
    experts, width = experts_EN.shape
    down_END = down_FD.float()[experts_EN]
    gram_ENN = down_END @ down_END.transpose(1, 2)
    rows = []
    for chunk_TF in hidden_TF.split(_CHUNK_TOKENS):
        hidden_ETN = chunk_TF[:, experts_EN.reshape(-1)].float().view(-1, experts, width)
        hidden_ETN = hidden_ETN.transpose(0, 1).contiguous()
        gained_ETN = torch.bmm(hidden_ETN, gram_ENN)
        if bias_ED is not None:
            gained_ETN += 2 * (down_END @ bias_ED.float()[:, :, None]).transpose(1, 2)
        rows.append((gained_ETN * hidden_ETN).sum(-1).T)
    contribution_TE = torch.cat(rows)
    if bias_ED is not None:
        contribution_TE = contribution_TE + bias_ED.float().square().sum(1)
    return contribution_TE.clamp_min_(0.0)


def expert_errors(
    target_TD: Tensor,
    hidden_TF: Tensor,
    down_FD: Tensor,
    experts_EN: Tensor,
    bias_ED: Tensor | None = None,
) -> Tensor:
    """Squared distance of each expert's output to the one that is wanted, (T, E).

    ``||y - (h_e Wd_e + b_e)||^2``: for experts each of which stands for the whole FFN.

    Args:
        target_TD: the wanted output y, (T, D).
        hidden_TF: neuron activations h, (T, F).
        down_FD: down projection, (F, D).
        experts_EN: neuron ids of each expert, (E, N).
        bias_ED: constants that come with an expert's output, (E, D).
    """
    columns = []
    for expert, ids_N in enumerate(experts_EN):
        error_TD = target_TD.float() - hidden_TF[:, ids_N].float() @ down_FD[ids_N].float()
        if bias_ED is not None:
            error_TD -= bias_ED[expert].float()
        columns.append(error_TD.square().sum(1))
    return torch.stack(columns, dim=1)
