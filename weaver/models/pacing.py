"""Pacing: every sequence uses, on average, as many experts as its layers were set to, on any text.

A threshold that is right for one kind of text selects more experts on another, in all layers alike.
The pacer watches what a sequence has used so far and moves the thresholds of the layers that come
next; the first tokens, to which all later ones attend, run every expert. ``docs/pacing.md`` has the
measurements.

This file needs torch and transformers only: exports carry a copy of it.

Shapes: B sequences, T tokens of one call, L paced layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

# docs/LOG.md has what other values of these gave.
# A young sequence is taken to have kept the pace for this many tokens.
PRIOR_TOKENS = 16.0
# A layer foresees this share of the drift of the layers before it, and the first layers are taken
# to stand behind this many that had none.
FORESEEN, PRIOR_LAYERS = 0.8, 2.0
# Overspending is paid back by the layers that remain and by this many more, since the last layers
# would otherwise pay for whatever those before them did.
EXTRA_LAYERS = 2.0
# Limits of a token's target, as multiples of K.
LOWEST_TARGET, HIGHEST_TARGET = 0.77, 1.5


@dataclass(frozen=True)
class PacedLayer:
    """Experts, costs and threshold slope of one layer, as the pacer needs them.

    Args:
        experts: mean number of experts per token on calibration text, behind the early tokens.
        early_experts: the same at the early tokens of a sequence, which want more.
        width: N, neurons per expert: the cost of an expert.
        slope: how far the threshold falls when the target rises from K to 2 K, in score units.
    """

    experts: float
    early_experts: float
    width: int
    slope: float


class SpentExperts(DynamicLayer):
    """Experts that sequences have used, kept as one more layer of the cache of keys and values.

    ``keys`` are running totals, int32, (B, 1, tokens, L + 1): experts used in each paced layer
    behind the first tokens, then the number of tokens. A history like that of keys is reordered,
    cropped and selected with them, so that beam search and assisted decoding find the right state.
    """

    # A cache is what all its layers are: a static one stays one, for which masks are made in full.
    is_compileable = True

    def append(self, totals_BTC: Tensor) -> None:
        """Add the totals after each of the newest tokens, (B, T, L + 1)."""
        rows = totals_BTC[:, None]
        if not self.is_initialized:
            self.lazy_initialization(rows, rows)
        old = self.keys
        self.keys = rows if old is None or old.numel() == 0 else torch.cat([old, rows], dim=-2)
        self.values = self.keys[..., :0]

    def newest(self) -> Tensor | None:
        """Totals after the newest token, (B, L + 1); None before the first."""
        if self.keys is None or self.get_seq_length() == 0:
            return None
        return self.keys[:, 0, -1]


class Pacer:
    """Thresholds of the paced layers during one call of a model.

    With ``n_lt`` the experts that token t uses in layer l, and ``K_lt`` those given to its place,
    the overspending that layer l sees is that of the layers before it, over the sequence's earlier
    tokens: ``o_lt = sum_{l' < l} sum_{s < t} N_l' (n_l's - K_l's) / (C (t + P))`` layers per token,
    with C the mean of ``K_l N_l`` over layers, ``u_l = K_l N_l / C`` and P ``PRIOR_TOKENS``. Layer
    l saves a part of its experts

    ``save_lt = f (o_lt + sum_{l' < l} u_l' save_l't) / (sum_{l' < l} u_l' + Y)
    + o_lt / (sum_{l' >= l} u_l' + X)``

    within limits, with f ``FORESEEN``, Y ``PRIOR_LAYERS`` and X ``EXTRA_LAYERS``. The first term is
    the drift of the layers before it, what they saved added again: the layer expects the same of
    itself. The second one pays back, evenly over the layers that remain. An expert runs if its
    score exceeds ``slope_l save_lt``. No layer waits for one behind it and no token for itself, so
    that a prompt at once and token by token select the same experts; and layers keep the
    differences between them, as does a hard token beside an easy one. The first tokens of a
    sequence run all experts and are not counted.

    Args:
        layers: the paced layers in the model's order.
        first_tokens: tokens at the start of a sequence that run every expert.
        early_tokens: tokens at its start, the first ones included, that are given
            ``early_experts``.
    """

    def __init__(
        self, layers: Sequence[PacedLayer], first_tokens: int, early_tokens: int = 0
    ) -> None:
        self.layers = tuple(layers)
        self.first_tokens = first_tokens
        self.early_tokens = max(first_tokens, early_tokens)
        self._rows = 0
        self._paced = False
        self._counts: list[Tensor | None] = []
        self._constants_device: torch.device | None = None

    def begin(self, mask_BT: Tensor, totals_BC: Tensor | None = None) -> None:
        """Start a call whose rows are sequences, or go on with them.

        Args:
            mask_BT: 1 for tokens, 0 for padding, (B, T).
            totals_BC: what the sequences have used, (B, L + 1); None at their start.
        """
        self._prepare(mask_BT.device)
        batch, tokens = mask_BT.shape
        if totals_BC is None:
            totals_BC = mask_BT.new_zeros(batch, len(self.layers) + 1, dtype=torch.int32)
        self._totals_BC = totals_BC.to(mask_BT.device)
        self._mask_BT = mask_BT = mask_BT.int()
        rank_BT = self._totals_BC[:, -1:] + mask_BT.cumsum(1) - 1
        self._free_BT = (rank_BT < self.first_tokens) & (mask_BT > 0)
        self._counted_BT = ((rank_BT >= self.first_tokens) & (mask_BT > 0)).float()
        age_BT = (rank_BT - self.first_tokens).clamp_min(0).float()
        self._share_BT = 1 / (age_BT + PRIOR_TOKENS)
        seen_B1, most = self._totals_BC[:, -1:], self.early_tokens - self.first_tokens
        early_B1 = (seen_B1 - self.first_tokens).clamp(0, most)
        late_B1 = (seen_B1 - self.early_tokens).clamp_min(0)
        given_BL = self._early_L * early_B1 + self._experts_L * late_B1
        spent_BL = self._unit_L * (self._totals_BC[:, :-1] - given_BL)
        # Before each layer: what those before it have spent too much in earlier calls.
        past_BL = spent_BL.cumsum(1) - spent_BL
        self._counts = [None] * len(self.layers)
        self._rows, self._paced = batch * tokens, True
        if tokens == 1:
            lowest_BL = self._lowest(past_BL * self._share_BT @ self._save_LL.T, self._slope_L)
            self._lowest_LB = lowest_BL.T.contiguous()
            return
        # The same with this call's tokens, right for the first layer and those whose predecessor
        # has run.
        self._over_LBT = past_BL.T[..., None].repeat(1, 1, tokens)
        self._spent_LB1 = spent_BL.T[..., None]
        early_BT = (rank_BT < self.early_tokens).float()
        added_L = self._early_L - self._experts_L
        self._given_LBT = torch.addcmul(
            self._experts_L[:, None, None], added_L[:, None, None], early_BT
        )
        self._unit_LBT = self._unit_L[:, None, None] * self._counted_BT

    def free(self, positions_BT: Tensor) -> None:
        """Start a call whose sequences are not known: calibrated thresholds, first tokens by place.

        Args:
            positions_BT: place of each token in its sequence, (B, T).
        """
        self._free_BT = positions_BT < self.first_tokens
        self._counts = [None] * len(self.layers)
        self._rows, self._paced = positions_BT.numel(), False

    def end(self) -> None:
        """Nothing is paced until the next call begins."""
        self._rows = 0

    def lowest(self, index: int, rows: int) -> Tensor | None:
        """The score that an expert must exceed, (B * T,); None outside of a call.

        Args:
            index: of the layer.
            rows: tokens that the layer was given.
        """
        if rows != self._rows:
            return None
        if not self._paced:
            return torch.where(self._free_BT, -torch.inf, 0.0).flatten()
        if self._mask_BT.shape[1] == 1:
            return self._lowest_LB[index]
        before = index + 1
        save_R = self._save_LL[index, :before] @ self._over_LBT[:before].flatten(1)
        save_BT = save_R.view_as(self._share_BT) * self._share_BT
        return self._lowest(save_BT, self._slope_L[index]).flatten()

    def _lowest(self, save: Tensor, slope: Tensor) -> Tensor:
        save = save.clamp(1 - HIGHEST_TARGET, 1 - LOWEST_TARGET)
        return (slope * save).masked_fill(self._free_BT, -torch.inf)

    def record(self, index: int, counts_T: Tensor) -> None:
        """Take the number of experts that every token used in a layer, (B * T,).

        A layer that runs again in a backward pass finds what it found before.
        """
        if counts_T.numel() != self._rows or not self._paced:
            return
        # Layers may lie on several devices.
        counts_BT = counts_T.to(self._mask_BT.device).view(self._mask_BT.shape)
        self._counts[index] = counts_BT
        if counts_BT.shape[1] > 1 and index + 1 < len(self.layers):
            over_BT = (counts_BT - self._given_LBT[index]) * self._unit_LBT[index]
            earlier_BT = over_BT.cumsum(1) - over_BT + self._spent_LB1[index]
            torch.add(self._over_LBT[index], earlier_BT, out=self._over_LBT[index + 1])

    def totals(self) -> Tensor | None:
        """Totals after every token of the call, int32, (B, T, L + 1); None if nothing was paced."""
        if not self._paced or any(counts is None for counts in self._counts):
            return None
        counted_BT1 = self._counted_BT.int()[..., None]
        used_BTL = torch.stack([c for c in self._counts if c is not None], dim=-1) * counted_BT1
        new_BTC = torch.cat([used_BTL.int(), self._mask_BT[..., None]], dim=-1)
        return self._totals_BC[:, None] + new_BTC.cumsum(1, dtype=torch.int32)

    def _prepare(self, device: torch.device) -> None:
        """The layers' constants as tensors, made late: models are built without data first."""
        if self._constants_device == device:
            return
        costs = [layer.experts * layer.width for layer in self.layers]
        mean = sum(costs) / len(costs)

        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        # In units of one layer's mean cost, so that float32 holds any sequence.
        self._unit_L = tensor([layer.width / mean for layer in self.layers])
        self._experts_L = tensor([layer.experts for layer in self.layers])
        self._early_L = tensor([layer.early_experts for layer in self.layers])
        self._slope_L = tensor([layer.slope for layer in self.layers])
        self._save_LL = torch.tensor(_savings([cost / mean for cost in costs]), device=device)
        self._constants_device = device


def _savings(costs: Sequence[float]) -> list[list[float]]:
    """The matrix of ``save = matrix @ o``, lower triangular, (L, L); see ``Pacer``.

    Args:
        costs: u of each layer.
    """
    rows: list[list[float]] = []
    # What the layers before the next one save, as a combination of what each of them sees.
    saved = [0.0] * len(costs)
    for index, cost in enumerate(costs):
        foresee = FORESEEN / (sum(costs[:index]) + PRIOR_LAYERS)
        row = [foresee * share for share in saved]
        row[index] += foresee + 1 / (sum(costs[index:]) + EXTRA_LAYERS)
        saved = [share + cost * own for share, own in zip(saved, row, strict=True)]
        rows.append(row)
    return rows


def pace(
    backbone: nn.Module,
    layers: Sequence[tuple[Any, PacedLayer]],
    first_tokens: int,
    early_tokens: int,
) -> None:
    """Let a model pace its sequences, calls with a cache included.

    Args:
        backbone: the decoder, called as transformers' are.
        layers: modules that take a ``(Pacer, index)`` as their ``pace``, with what they are.
        first_tokens, early_tokens: see ``Pacer``.
    """
    if not layers:
        return
    pacer = Pacer([layer for _, layer in layers], first_tokens, early_tokens)
    for index, (module, _) in enumerate(layers):
        module.pace = (pacer, index)
    calls = _Calls(pacer, tuple(inspect.signature(backbone.forward).parameters))
    backbone.register_forward_pre_hook(calls.before, with_kwargs=True)
    backbone.register_forward_hook(calls.after, with_kwargs=True)


class _Calls:
    """The hooks around a backbone's forward: from its arguments to sequences, and back to a cache.

    Args:
        pacer: of the model.
        parameters: names of what the backbone's forward takes, in their order.
    """

    def __init__(self, pacer: Pacer, parameters: tuple[str, ...]) -> None:
        self.pacer, self.parameters = pacer, parameters

    @torch.no_grad()
    def before(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Begin a call; a cache that the backbone would make itself is made here."""
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        ids = kwargs.get("input_ids")
        shown = kwargs["inputs_embeds"] if ids is None else ids
        config: Any = backbone.config
        wanted = kwargs.get("use_cache")
        wanted = config.use_cache if wanted is None else wanted
        if wanted and not backbone.training and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache(config=config)
        self._begin(shown.shape[:2], shown.device, kwargs)
        return (), kwargs

    def _begin(self, shape: tuple[int, int], device: torch.device, kwargs: dict[str, Any]) -> None:
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        cache, spent = kwargs.get("past_key_values"), _spent(kwargs.get("past_key_values"))
        seen = 0 if cache is None else cache.get_seq_length()
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        # A server that keeps keys itself shows tokens of many sequences as one row.
        known = (spent is not None or seen == 0) and "attention_instances" not in kwargs
        if known and padding is not None:
            self.pacer.begin(padding[:, -shape[1] :], spent)
        elif known and mask is None and (spent is not None or _at_start(positions)):
            self.pacer.begin(torch.ones(shape, dtype=torch.int32, device=device), spent)
        else:
            if positions is None:
                positions = seen + torch.arange(shape[1], device=device)[None]
            self.pacer.free(positions.expand(shape))

    @torch.no_grad()
    def after(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keep what was spent, and end the call unless a backward pass may run layers again."""
        del args, output
        cache, totals = kwargs.get("past_key_values"), self.pacer.totals()
        if cache is not None and totals is not None:
            if not cache.layers or not isinstance(cache.layers[-1], SpentExperts):
                cache.layers.append(SpentExperts())  # type: ignore[no-untyped-call]
            cache.layers[-1].append(totals)
        if not backbone.training:
            self.pacer.end()


def _spent(cache: Any) -> Tensor | None:
    if cache is None or not cache.layers or not isinstance(cache.layers[-1], SpentExperts):
        return None
    return cache.layers[-1].newest()


def _at_start(positions_BT: Tensor | None) -> bool:
    """Whether each row is one sequence from its first token on; a graph cannot ask."""
    if positions_BT is None:
        return True
    if torch.compiler.is_compiling():
        return False
    return bool(
        (positions_BT == torch.arange(positions_BT.shape[1], device=positions_BT.device)).all()
    )
