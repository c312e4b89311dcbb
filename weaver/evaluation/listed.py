"""A model against a runtime that lists the likeliest tokens only: llama.cpp, vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The likeliest tokens whose log-probabilities are compared, and how many a runtime is asked for.
TOP, LISTED = 10, 100


@dataclass
class ListedTotals:
    """Sums over positions of how a runtime's listed log-probabilities q differ from a model's p.

    KL: ``sum_{t listed} p_t log(p_t / q_t) + p_r log(p_r / q_r)``, all tokens that are not listed
    taken as one token r. Merging tokens never increases a divergence, so that it is a lower bound
    of KL(p || q), and the closer the less probability is left to r.

    A token of the model's ten likeliest that the runtime does not list has less than the least
    listed probability there: the difference counts with that.
    """

    differences: list[float] = field(default_factory=list)
    kl: float = 0.0
    hits: int = 0
    positions: int = 0

    def add(self, log_p_TV: Tensor, listed: Sequence[Mapping[int, float]]) -> None:
        """Add positions.

        Args:
            log_p_TV: log-probabilities of the model, (T, V).
            listed: for each position what the runtime listed.
        """
        for log_p_V, found in zip(log_p_TV.double(), listed, strict=True):
            top = log_p_V.topk(TOP)
            least = min(found.values())
            for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                differs = abs(value - found[token]) if token in found else max(0.0, value - least)
                self.differences.append(differs)
            self.hits += max(found, key=lambda token: found[token]) == int(top.indices[0])
            self.kl += _merged_kl(log_p_V, found)
            self.positions += 1

    @property
    def mean_kl(self) -> float:
        """Mean over positions, nats per token."""
        return self.kl / self.positions

    @property
    def top1_agreement(self) -> float:
        """Share of positions where both put the same token first."""
        return self.hits / self.positions

    @property
    def mean_difference(self) -> float:
        """Mean absolute difference of the ten likeliest tokens' log-probabilities, nats."""
        return sum(self.differences) / len(self.differences)


def _merged_kl(log_p_V: Tensor, found: Mapping[int, float]) -> float:
    log_q_N = torch.tensor(list(found.values()), dtype=torch.float64, device="cpu")
    log_p_N = log_p_V[torch.tensor(list(found), device="cpu")]
    tiny = torch.finfo(torch.float64).eps
    rest_p, rest_q = (1 - x_N.exp().sum().clamp_max(1 - tiny) for x_N in (log_p_N, log_q_N))
    listed = (log_p_N.exp() * (log_p_N - log_q_N)).sum()
    return float(listed + rest_p * (rest_p / rest_q).log())
