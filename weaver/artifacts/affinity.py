"""How alike groups of text prune a model: what a partition by groups keeps of its measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass

from torch import Tensor

from weaver.artifacts.record import TensorRecord


@dataclass(frozen=True)
class AffinityRow(TensorRecord):
    """One model, pruned by the statistics of one group, on the text of every group.

    Args:
        nll_G: mean negative log-likelihood on each group's text, nats per token, float64, (G,).
    """

    nll_G: Tensor


@dataclass(frozen=True)
class Affinity(TensorRecord):
    """Domain affinity and the expert of each group; see ``weaver.algorithms.affinity``.

    Rows are the groups that a model was pruned by, columns those it was measured on.

    Args:
        perplexity_GG: of the model pruned by the row's group on the column's text, float64, (G, G).
        normalised_GG: the best of a column over each of its values, float64, (G, G).
        correlation_GG: Pearson correlation between rows of that, float64, (G, G).
        linkage_M4: the hierarchical clustering as scipy has it, float64, (G - 1, 4).
        experts_G: expert of each group, int64, (G,); experts are numbered by their first group.
        groups_json: names of the groups, a JSON list.
        text: what was measured on: "held-out", or "calibration" where a group has no other text.
        tokens: predicted tokens of each group.
    """

    perplexity_GG: Tensor
    normalised_GG: Tensor
    correlation_GG: Tensor
    linkage_M4: Tensor
    experts_G: Tensor
    groups_json: str
    text: str
    tokens: int

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(json.loads(self.groups_json))
