"""Permuted FFNs at unit scale and routings of awkward shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from weaver.algorithms.glu import GluWeights
from weaver.kernels.reference import Routing

MakeFfn = Callable[..., GluWeights]
MakeRouting = Callable[..., Routing]


@pytest.fixture
def make_ffn() -> MakeFfn:
    """A random FFN whose outputs have about unit variance for inputs of unit variance."""

    def build(
        hidden: int,
        neurons: int,
        *,
        dtype: torch.dtype = torch.float64,
        activation: str = "silu",
        biases: bool = False,
    ) -> GluWeights:
        generator = torch.Generator().manual_seed(hidden * 1000 + neurons)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        return GluWeights(
            gate_FD=normal(neurons, hidden, scale=2 * hidden**-0.5),
            up_FD=normal(neurons, hidden, scale=hidden**-0.5),
            down_FD=normal(neurons, hidden, scale=max(neurons, 1) ** -0.5),
            activation=activation,
            gate_bias_F=normal(neurons) if biases else None,
            up_bias_F=normal(neurons) if biases else None,
            output_bias_D=normal(hidden) if biases else None,
        ).to(dtype)

    return build


@pytest.fixture
def make_routing() -> MakeRouting:
    """A routing of T tokens; ``hot`` names an expert of every token, ``never`` one of none.

    With ``uneven`` token t keeps its first t mod (K + 1) experts only, with ``nothing`` none.
    """

    def build(
        tokens: int,
        experts: int,
        top_k: int,
        *,
        hot: int | None = None,
        never: int | None = None,
        uneven: bool = False,
        nothing: bool = False,
    ) -> Routing:
        generator = torch.Generator().manual_seed(tokens)
        preference_TE = torch.rand(tokens, experts, generator=generator)
        if hot is not None:
            preference_TE[:, hot] = 2.0
        if never is not None:
            preference_TE[:, never] = -1.0
        ids_TK = preference_TE.topk(top_k, dim=-1).indices
        weights_TK = 0.5 + torch.rand(tokens, top_k, generator=generator)
        every = Routing.of_top_k(ids_TK, weights_TK, experts)
        if not (uneven or nothing):
            return every
        allowed_T = torch.arange(tokens) % (top_k + 1) * (not nothing)
        kept_TK = torch.arange(top_k) < allowed_T[:, None]
        kept_P = kept_TK.reshape(-1)
        return Routing(
            every.tokens_P[kept_P],
            every.experts_P[kept_P],
            every.weights_P[kept_P],
            tokens,
            experts,
        )

    return build
