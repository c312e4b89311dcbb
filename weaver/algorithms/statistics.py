"""Streaming statistics of one layer's FFN over the calibration tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from weaver.algorithms.glu import GluWeights, gate_activation, glu_hidden
from weaver.artifacts.types import LayerProfile

_CHUNK_TOKENS = 1024

# Of the RMS norms behind the FFNs of Gemma and OLMo.
_NORM_EPS = 1e-6


def activation_rates(topk_neurons_TK: Tensor, intermediate_size: int) -> Tensor:
    """Fraction of tokens for which each neuron is among the K_a most active.

    mu_f = (1/T) * sum_t [f in top-K_a(|h_t|)]

    Args:
        topk_neurons_TK: neuron ids per token, int, (T, K_a), no id twice for one token.
        intermediate_size: F, the number of neurons of the dense FFN.
    Returns:
        Rates in [0, 1], float32, (F,); they sum to K_a.
    Raises:
        ValueError: T is 0, or an id lies outside [0, F).
    Source: CMoE, arXiv:2502.04416, section 4.1.
    """
    tokens = topk_neurons_TK.shape[0]
    if tokens == 0:
        raise ValueError("activation rates need at least one token")
    ids = topk_neurons_TK.reshape(-1).long()
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= intermediate_size):
        raise ValueError(f"neuron id outside 0..{intermediate_size - 1}")
    counts_F = torch.bincount(ids, minlength=intermediate_size)
    return (counts_F.double() / tokens).float()


def normalised(weights: GluWeights) -> GluWeights:
    """The FFN with L2-normalised gate and up rows, in its own dtype; ``down_FD`` stays.

    Biases of the gate and up projections are left out: CMoE's formula has none, and beside
    normalised rows and inputs their size would mean nothing.
    """
    return replace(
        weights,
        gate_FD=functional.normalize(weights.gate_FD.float(), dim=1).to(weights.gate_FD.dtype),
        up_FD=functional.normalize(weights.up_FD.float(), dim=1).to(weights.up_FD.dtype),
        gate_bias_F=None,
        up_bias_F=None,
    )


def marker_neurons(x_TD: Tensor, weights: GluWeights, top_k: int) -> Tensor:
    """The neurons that mark each token: the K_a with the largest normalised activation.

    ``top-K_a over j of |act(x^ . wg^_j) * (x^ . wu^_j)|``, where ``v^ = v / ||v||_2``

    Args:
        x_TD: FFN inputs, (T, D).
        weights: the FFN after ``normalised``.
        top_k: K_a.
    Returns:
        Neuron ids, most active first, int32, (T, K_a).
    Raises:
        ValueError: K_a lies outside 1..F.
    Source: CMoE, arXiv:2502.04416, section 4.1. The input is normalised here too, so that the
        length of a token's hidden state does not move it along the activation's curve.
    """
    if not 1 <= top_k <= weights.intermediate_size:
        raise ValueError(f"activation_top_k={top_k} outside 1..{weights.intermediate_size}")
    unit_TD = functional.normalize(x_TD.float(), dim=1).to(weights.gate_FD.dtype)
    return glu_hidden(unit_TD, weights).abs().topk(top_k, dim=1).indices.int()


def input_rows(limit_mb: float, hidden_size: int, dtype: torch.dtype) -> int:
    """How many FFN inputs fit into ``limit_mb`` megabytes (10^6 bytes); at least 1."""
    return max(1, int(limit_mb * 1e6 / (hidden_size * dtype.itemsize)))


def sample_positions(tokens: int, rows: int, generator: torch.Generator) -> Tensor:
    """Token positions of a sample spread over the whole stream, ascending, int64, (<= rows,).

    The stream is cut into ``rows`` equal stretches and one position is drawn in each: a fixed
    stride could meet the sequence length and sample one place of every sequence.

    Args:
        tokens: T, length of the stream.
        rows: positions wanted; all T when there are no more.
        generator: source of the draws, on the CPU.
    """
    if rows >= tokens:
        return torch.arange(tokens, device=generator.device)
    edges = torch.arange(rows + 1, device=generator.device) * tokens // rows
    offset = torch.rand(rows, generator=generator, dtype=torch.float64, device=generator.device)
    return edges[:-1] + (offset * edges.diff()).long()


def error_weights(y_TD: Tensor) -> Tensor:
    """How much an error in an FFN's output counts where the layer normalises that output.

    ``w_t = 1 / (||y_t||^2 / D + eps)``: behind the norm an error counts relative to the size of y.
    A first token (BOS) whose output is a fiftieth of the others' counts 2,500 times as much, as it
    does for the model; eps is that of the norm.

    Args:
        y_TD: outputs of the dense FFN, (T, D).
    Returns:
        float32, positive, (T,).
    Source: the norm behind the FFN is Gemma 2's, arXiv:2408.00118.
    """
    return 1.0 / (y_TD.float().square().mean(1) + _NORM_EPS)


class Moments:
    """Weighted mean and variance of neuron activations, merged chunk by chunk.

    ``mean = sum_t w_t h_t / sum_t w_t``, and likewise the population variance; w is 1 if left out.

    The variance comes from centred sums (Chan, Golub and LeVeque), so that a mean much larger than
    the spread cancels nothing.
    """

    def __init__(self, neurons: int, device: torch.device) -> None:
        self.count = 0.0
        self.mean_F = torch.zeros(neurons, dtype=torch.float64, device=device)
        self._square_F = torch.zeros(neurons, dtype=torch.float64, device=device)

    def add(self, hidden_TF: Tensor, weights_T: Tensor | None = None) -> None:
        """Add the activations of some tokens, (T, F), and what each of them counts."""
        seen = self.count
        hidden_TF = hidden_TF.float()
        if weights_T is None:
            count = float(hidden_TF.shape[0])
            mean_F = hidden_TF.mean(0)
            # Two passes: five times as fast as var_mean over the rows of a matrix.
            spread_F = (hidden_TF - mean_F).square_().sum(0)
        else:
            count = float(weights_T.sum())
            mean_F = weights_T @ hidden_TF / count
            spread_F = weights_T @ (hidden_TF - mean_F).square_()
        apart_F = mean_F.double() - self.mean_F
        self._square_F += spread_F.double()
        self._square_F += apart_F.square() * (seen * count / (seen + count))
        self.mean_F += apart_F * (count / (seen + count))
        self.count += count

    @property
    def variance_F(self) -> Tensor:
        """Population variance, (F,); zeros before the first token."""
        return self._square_F / (self.count or 1.0)


class LayerStatistics:
    """Collects a ``LayerProfile`` from batches of FFN inputs.

    Sums and moments are float32 within a chunk of tokens and float64 over all of them. How the
    tokens are cut into batches changes the result by float rounding only.

    Args:
        weights: the dense FFN whose neurons are watched; one layer at a time is in memory.
        num_samples: M, calibration samples that will be seen.
        activation_top_k: K_a, markers per token.
        input_positions_N: positions in the token stream whose FFN inputs are kept, ascending
            (see ``sample_positions``).
        sample_groups_M: group of each sample, (M,), to keep the moments of h by group as well.
        num_groups: G, of these groups.
        window: T, tokens per window of the stream; None where it does not show windows one by one.
    """

    def __init__(
        self,
        weights: GluWeights,
        num_samples: int,
        activation_top_k: int,
        input_positions_N: Tensor,
        sample_groups_M: Tensor | None = None,
        num_groups: int = 0,
        window: int | None = None,
    ) -> None:
        neurons, device = weights.intermediate_size, weights.device
        sum_MF = torch.zeros(num_samples, neurons, dtype=torch.float64, device=device)
        self._weights = weights
        self._marker_weights = normalised(weights)
        self._top_k = activation_top_k
        self._positions_N = input_positions_N.to(device)
        self._gate_sum_MF, self._gate_abs_sum_MF = sum_MF, sum_MF.clone()
        self._tokens_M = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self._moments = Moments(neurons, device)
        self._groups_M = None if sample_groups_M is None else sample_groups_M.to(device)
        self._group_moments = [Moments(neurons, device) for _ in range(num_groups)]
        self._group_tokens_G = torch.zeros(num_groups, dtype=torch.int64, device=device)
        self._markers: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self._input_weights: list[Tensor] = []
        self._window = window
        self._tokens = 0

    def update(self, x_TD: Tensor, sample_ids_T: Tensor) -> None:
        """Add the next tokens of the stream.

        Args:
            x_TD: FFN inputs, (T, D).
            sample_ids_T: calibration sample of each token, int, (T,).
        Raises:
            ValueError: lengths differ, or a sample id lies outside [0, M).
        """
        if x_TD.shape[0] != sample_ids_T.shape[0]:
            raise ValueError(f"{x_TD.shape[0]} tokens with {sample_ids_T.shape[0]} sample ids")
        samples = self._tokens_M.shape[0]
        if bool(((sample_ids_T < 0) | (sample_ids_T >= samples)).any()):
            raise ValueError(f"sample id outside 0..{samples - 1}")
        for start in range(0, x_TD.shape[0], _CHUNK_TOKENS):
            chunk = slice(start, start + _CHUNK_TOKENS)
            self._add(x_TD[chunk], sample_ids_T[chunk])

    def _add(self, x_TD: Tensor, ids_T: Tensor) -> None:
        self._markers.append(marker_neurons(x_TD, self._marker_weights, self._top_k))
        typed_TD = x_TD.to(self._weights.gate_FD.dtype)
        gate_TF = gate_activation(typed_TD, self._weights)
        self._add_gate(gate_TF, ids_T)
        up_TF = functional.linear(typed_TD, self._weights.up_FD, self._weights.up_bias_F)
        hidden_TF = gate_TF * up_TF
        weights_T = None
        if self._weights.normed_output:
            y_TD = hidden_TF @ self._weights.down_FD
            if self._weights.output_bias_D is not None:
                y_TD = y_TD + self._weights.output_bias_D
            weights_T = error_weights(y_TD)
        self._keep_inputs(x_TD, weights_T)
        self._moments.add(hidden_TF, weights_T)
        if self._groups_M is not None:
            groups_T = self._groups_M[ids_T]
            for group in groups_T.unique().tolist():
                here_T = groups_T == group
                here_t = None if weights_T is None else weights_T[here_T]
                self._group_moments[group].add(hidden_TF[here_T], here_t)
                self._group_tokens_G[group] += int(here_T.sum())
        self._tokens += x_TD.shape[0]

    def _keep_inputs(self, x_TD: Tensor, weights_T: Tensor | None) -> None:
        positions_N = self._positions_N - self._tokens
        here_n = positions_N[(positions_N >= 0) & (positions_N < x_TD.shape[0])]
        # Copied, so that the batch itself can be freed.
        self._inputs.append(x_TD[here_n].detach().clone())
        if weights_T is not None:
            self._input_weights.append(weights_T[here_n])

    def _add_gate(self, gate_TF: Tensor, ids_T: Tensor) -> None:
        samples_m, member_T = ids_T.unique(return_inverse=True)
        # Sums over a chunk fit into float32; those over all tokens are kept in float64.
        one_hot_mT = functional.one_hot(member_T, samples_m.numel()).T.float()
        gate_TF = gate_TF.float()
        self._gate_sum_MF[samples_m] += (one_hot_mT @ gate_TF).double()
        self._gate_abs_sum_MF[samples_m] += (one_hot_mT @ gate_TF.abs()).double()
        self._tokens_M += torch.bincount(ids_T, minlength=self._tokens_M.shape[0])

    def finish(self, sample_groups_M: Tensor) -> LayerProfile:
        """The profile of everything seen.

        Args:
            sample_groups_M: group (task or domain) of each sample, int, (M,).
        Raises:
            ValueError: no tokens were seen, a sample got none, or M does not agree.
        """
        if sample_groups_M.shape != self._tokens_M.shape:
            raise ValueError(
                f"{sample_groups_M.numel()} groups for {self._tokens_M.numel()} samples"
            )
        empty = (self._tokens_M == 0).nonzero().flatten().tolist()
        if empty or self._tokens == 0:
            raise ValueError(f"no tokens in samples {empty[:10]}")
        tokens_M1 = self._tokens_M[:, None].double()
        return LayerProfile(
            sample_gate_mean_MF=(self._gate_sum_MF / tokens_M1).float(),
            sample_gate_abs_mean_MF=(self._gate_abs_sum_MF / tokens_M1).float(),
            sample_tokens_M=self._tokens_M.clone(),
            sample_groups_M=sample_groups_M.long().to(self._tokens_M.device),
            hidden_mean_F=self._moments.mean_F.float(),
            hidden_variance_F=self._moments.variance_F.float(),
            marker_neurons_TA=torch.cat(self._markers),
            ffn_inputs_ND=torch.cat(self._inputs),
            input_places_N=self._places(),
            input_weights_N=torch.cat(self._input_weights) if self._input_weights else None,
            tokens=self._tokens,
            **self._by_group(),
        )

    def _places(self) -> Tensor | None:
        """Places of the kept inputs in their windows."""
        if self._window is None:
            return None
        kept_N = self._positions_N[self._positions_N < self._tokens]
        return (kept_N % self._window).int()

    def _by_group(self) -> dict[str, Tensor]:
        moments = self._group_moments
        if not moments:
            return {}
        return {
            "group_tokens_G": self._group_tokens_G.clone(),
            "group_hidden_mean_GF": torch.stack([each.mean_F for each in moments]).float(),
            "group_hidden_variance_GF": torch.stack([each.variance_F for each in moments]).float(),
        }
