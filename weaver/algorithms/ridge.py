"""Ridge regression in closed form: the one solver of routers and of re-solved projections."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the diagonal of a standardised Gram matrix, so that constant columns stay solvable.
_JITTER = 1e-6

_CPU = torch.device("cpu")


def ridge_fit(x_TD: Tensor, y_TE: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Linear regression with an intercept and an L2 penalty on standardised inputs.

    ``min_{W, b} sum_t ||y_t - (x_t W^T + b)||^2 + penalty * T * sum_d (sd_d * ||W_d||)^2``

    The penalty is relative: 0.1 weighs a standardised coefficient like a tenth of the tokens. The
    intercept is not penalised.

    Args:
        x_TD: inputs, (T, D).
        y_TE: targets, (T, E).
        penalty: at least 0.
    Returns:
        ``weight_ED`` (E, D) and ``bias_E`` (E,), float32.
    Raises:
        ValueError: no rows, or the row counts differ.
    """
    if x_TD.shape[0] == 0 or x_TD.shape[0] != y_TE.shape[0]:
        raise ValueError(f"{x_TD.shape[0]} inputs for {y_TE.shape[0]} targets")
    x_TD, y_TE = x_TD.float(), y_TE.float()
    mean_D, mean_E = x_TD.mean(0), y_TE.mean(0)
    centred_TD = x_TD - mean_D
    scale_D = centred_TD.square().mean(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
    standard_TD = centred_TD / scale_D
    gram_DD = standard_TD.T @ standard_TD / x_TD.shape[0]
    cross_DE = standard_TD.T @ (y_TE - mean_E) / x_TD.shape[0]
    gram_DD.diagonal().add_(penalty + _JITTER)
    weight_ED = (torch.cholesky_solve(cross_DE, torch.linalg.cholesky(gram_DD))).T / scale_D
    return weight_ED.contiguous(), mean_E - weight_ED @ mean_D


class ShrunkRegression:
    """Least squares shrunk toward given coefficients, from sums over chunks of tokens.

    ``min_B sum_t w_t ||y_t - z_t B||^2 + lambda * m * ||(B - B0)_pen||^2``, with
    ``G = sum_t w_t z_t^T z_t`` and m the mean of G's penalised diagonal, is solved by
    ``(G + lambda * m * I_pen) (B - B0) = sum_t w_t z_t^T y_t - G B0``.
    Only the first ``penalised`` rows of B are shrunk; constants and indicators are held by a
    thousandth of their own diagonal, which keeps those solvable that never vary.

    Every ``1 / HELD_OUT``-th chunk is held out: lambda is the candidate with the smallest error
    there, the final coefficients use all chunks. Memory is two Gram matrices, whatever the tokens.

    Args:
        columns: P, regressors.
        outputs: D.
        penalised: leading regressors whose coefficients are shrunk.
        device: of the sums and of the chunks.
    """

    HELD_OUT = 8

    def __init__(
        self, columns: int, outputs: int, penalised: int, device: torch.device = _CPU
    ) -> None:
        self.penalised = penalised
        self._gram_2PP = torch.zeros(2, columns, columns, device=device)
        self._cross_2PD = torch.zeros(2, columns, outputs, device=device)
        self._square_2 = torch.zeros(2, dtype=torch.float64, device=device)
        self._chunks = 0

    def add(self, z_TP: Tensor, y_TD: Tensor, weight_T: Tensor | None = None) -> None:
        """Add a chunk of tokens: regressors (T, P), targets (T, D) and weights (T,), float32."""
        if weight_T is not None and bool((weight_T != 1).any()):
            root_T1 = weight_T.sqrt()[:, None]
            z_TP, y_TD = z_TP * root_T1, y_TD * root_T1
        part = int(self._chunks % self.HELD_OUT == self.HELD_OUT - 1)
        self._gram_2PP[part].addmm_(z_TP.T, z_TP)
        self._cross_2PD[part].addmm_(z_TP.T, y_TD)
        self._square_2[part] += y_TD.square().sum(dtype=torch.float64)
        self._chunks += 1

    def solve(self, start_PD: Tensor, shrinkage: tuple[float, ...]) -> Tensor:
        """Coefficients, (P, D).

        Args:
            start_PD: B0.
            shrinkage: candidates of lambda; with fewer than ``HELD_OUT`` chunks nothing is held out
                and the largest is taken, the safest.
        Raises:
            ValueError: no candidate, or no tokens.
        """
        if not shrinkage or self._chunks == 0:
            raise ValueError("a regression needs tokens and at least one shrinkage")
        best = max(shrinkage)
        if len(shrinkage) > 1 and self._chunks >= self.HELD_OUT:
            best = min(shrinkage, key=lambda value: self._held_out_error(start_PD, value))
        gram_PP = self._gram_2PP.sum(0)
        return self._shrunk(gram_PP, self._cross_2PD.sum(0), start_PD, best)

    def _held_out_error(self, start_PD: Tensor, shrinkage: float) -> float:
        b_PD = self._shrunk(self._gram_2PP[0], self._cross_2PD[0], start_PD, shrinkage)
        fitted = (b_PD * (self._gram_2PP[1] @ b_PD)).sum(dtype=torch.float64)
        crossed = (b_PD * self._cross_2PD[1]).sum(dtype=torch.float64)
        return float(self._square_2[1] + fitted - 2 * crossed)

    def _shrunk(
        self, gram_PP: Tensor, cross_PD: Tensor, start_PD: Tensor, shrinkage: float
    ) -> Tensor:
        ridge_PP = gram_PP.clone()
        diagonal_P = ridge_PP.diagonal()
        diagonal_P += _JITTER * diagonal_P.mean()
        diagonal_P[: self.penalised] += shrinkage * gram_PP.diagonal()[: self.penalised].mean()
        # Indicators of experts that are always or never chosen are collinear with the constant.
        diagonal_P[self.penalised :] += 1e-3 * gram_PP.diagonal()[self.penalised :]
        diagonal_P[self.penalised :].clamp_min_(1.0)
        step_PD = torch.cholesky_solve(
            cross_PD - gram_PP @ start_PD, torch.linalg.cholesky(ridge_PP)
        )
        return start_PD + step_PD
