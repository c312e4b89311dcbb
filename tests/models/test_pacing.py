"""The pacer alone, on counts that are made up, and in models, with every kind of cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_conversions import (
    OpenTiny,
    ffns_of,
    load_converted,
    random_conversions,
    write_converted,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from weaver.artifacts.types import FIRST_TOKENS
from weaver.evaluation.usage import count_usage
from weaver.models.pacing import (
    EXTRA_LAYERS,
    FORESEEN,
    HIGHEST_TARGET,
    LOWEST_TARGET,
    PRIOR_LAYERS,
    PRIOR_TOKENS,
    PacedLayer,
    Pacer,
    SpentExperts,
)

LAYERS = (PacedLayer(experts=6.0, early_experts=6.0, width=8, slope=2.0),) * 12


def scores(batch: int, tokens: int, drift: float, seed: int = 0) -> Tensor:
    """Scores of 14 experts whose calibrated thresholds are 0, shifted by a drift."""
    generator = torch.Generator().manual_seed(seed)
    s_LBTE = torch.randn(len(LAYERS), batch, tokens, 14, generator=generator)
    # The score that 6 of 14 exceed; a shift of 2 x slope / K moves about one expert.
    return s_LBTE - 0.18 + drift


def run(pacer: Pacer, s_LBTE: Tensor) -> tuple[Tensor, Tensor]:
    """One call: numbers of experts, (L, B, T), and what they had to exceed."""
    counts, lowest = [], []
    for index, s_BTE in enumerate(s_LBTE):
        batch, tokens, _ = s_BTE.shape
        lowest_T = pacer.lowest(index, batch * tokens)
        assert lowest_T is not None
        lowest.append(lowest_T.view(batch, tokens))
        counts.append((s_BTE > lowest[-1][..., None]).sum(-1))
        pacer.record(index, counts[-1].flatten())
    return torch.stack(counts), torch.stack(lowest)


def saved(over: float, age: int) -> float:
    """What layer 1 of ``LAYERS[:2]`` saves if layer 0 overspent so many experts."""
    layers = over / 6 / (age + PRIOR_TOKENS)
    return layers * (FORESEEN / (1 + PRIOR_LAYERS) + 1 / (1 + EXTRA_LAYERS))


def test_thresholds_follow_the_formula() -> None:
    pacer = Pacer(LAYERS[:2], first_tokens=1)
    pacer.begin(torch.ones(1, 3))
    assert pacer.lowest(0, 3).tolist() == [-torch.inf, 0, 0]  # type: ignore[union-attr]
    pacer.record(0, torch.tensor([14, 9, 9]))
    # The token at place 1 spent three experts too many, seen by the one behind it in layer 1.
    found = pacer.lowest(1, 3).tolist()  # type: ignore[union-attr]
    assert found == pytest.approx([-torch.inf, 0, 2.0 * saved(3, age=1)])
    # Asked again, as usage counts and backward passes do, it says the same.
    pacer.record(0, torch.tensor([14, 9, 9]))
    assert pacer.lowest(1, 3).tolist() == found  # type: ignore[union-attr]


def test_a_layer_expects_of_itself_what_those_before_it_would_have_spent() -> None:
    """Layers that saved the drift still tell those behind them about it."""
    pacer = Pacer(LAYERS[:3], first_tokens=0)
    age, spent = 100, 1.0
    pacer.begin(torch.ones(1, 1), torch.tensor([[600 + 100, 600, 600, age]], dtype=torch.int32))
    lowest = [float(pacer.lowest(index, 1)) for index in range(3)]  # type: ignore[arg-type]
    seen = spent * age / 6 / (age + PRIOR_TOKENS)
    first = seen * (FORESEEN / (1 + PRIOR_LAYERS) + 1 / (2 + EXTRA_LAYERS))
    # Layer 1 kept the pace: what layer 0 overspent, and what layer 1 saved for it.
    second = FORESEEN * (seen + first) / (2 + PRIOR_LAYERS) + seen / (1 + EXTRA_LAYERS)
    assert lowest == pytest.approx([0, 2.0 * first, 2.0 * second])


def test_a_place_is_given_what_calibration_spent_there() -> None:
    """Early tokens that spend what they do on calibration text owe nothing to those behind."""
    layers = [replace(layer, early_experts=9.0) for layer in LAYERS[:2]]
    pacer = Pacer(layers, first_tokens=1, early_tokens=3)
    pacer.begin(torch.ones(1, 5))
    pacer.record(0, torch.tensor([14, 9, 9, 8, 6]))
    expected = [-torch.inf, 0, 0, 0, 2.0 * saved(2, age=3)]
    assert pacer.lowest(1, 5).tolist() == pytest.approx(expected)  # type: ignore[union-attr]
    # In the next call the account goes on where it was.
    pacer.record(1, torch.tensor([14, 9, 9, 6, 6]))
    totals_BTC = pacer.totals()
    assert totals_BTC is not None
    pacer.begin(torch.ones(1, 1), totals_BTC[:, -1])
    expected = [2.0 * saved(2, age=4)]
    assert pacer.lowest(1, 1).tolist() == pytest.approx(expected)  # type: ignore[union-attr]


def test_targets_have_limits() -> None:
    pacer = Pacer(LAYERS[:2], first_tokens=0)
    for count, target in ((10_000, LOWEST_TARGET), (-10_000, HIGHEST_TARGET)):
        pacer.begin(torch.ones(1, 2))
        pacer.record(0, torch.tensor([count, 0]))
        lowest = pacer.lowest(1, 2).tolist()  # type: ignore[union-attr]
        assert lowest[1] == pytest.approx(2.0 * (1 - target))


@pytest.mark.parametrize("drift", [-0.3, -0.1, 0.0, 0.1, 0.3])
def test_a_drift_of_all_layers_hardly_changes_the_mean(drift: float) -> None:
    pacer = Pacer(LAYERS, FIRST_TOKENS)
    pacer.begin(torch.ones(4, 256))
    s_LBTE = scores(4, 256, drift)
    counts_LBT, _ = run(pacer, s_LBTE)
    static = float((s_LBTE > 0).sum(-1).float().mean()) / 6
    paced = float(counts_LBT[..., FIRST_TOKENS:].float().mean()) / 6
    assert abs(paced - 1) < max(0.002, 0.15 * abs(static - 1))
    assert drift == 0 or abs(static - 1) > 0.08


def test_first_tokens_run_all_experts_and_are_not_counted() -> None:
    pacer = Pacer(LAYERS, FIRST_TOKENS)
    pacer.begin(torch.ones(2, 5))
    counts_LBT, _ = run(pacer, scores(2, 5, 0.0))
    assert (counts_LBT[..., :FIRST_TOKENS] == 14).all()
    totals_BTC = pacer.totals()
    assert totals_BTC is not None
    assert not totals_BTC[:, FIRST_TOKENS - 1, :-1].any()
    assert totals_BTC[:, -1, -1].tolist() == [5, 5]
    assert torch.equal(totals_BTC[:, -1, :-1].T, counts_LBT[..., FIRST_TOKENS:].sum(-1).int())


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 24),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=24),
    drift=st.floats(-0.5, 0.5),
    padding=st.integers(0, 3),
)
def test_a_prompt_in_pieces_selects_what_it_does_at_once(
    tokens: int, pieces: list[int], drift: float, padding: int
) -> None:
    s_LBTE = scores(2, tokens, drift)
    layers = [replace(layer, early_experts=8.0) for layer in LAYERS]
    pacer = Pacer(layers, FIRST_TOKENS, early_tokens=6)
    pacer.begin(torch.ones(2, tokens))
    whole_LBT, lowest_LBT = run(pacer, s_LBTE)
    padded = torch.zeros(len(LAYERS), 2, padding, 14)
    s_LBTE = torch.cat([padded, s_LBTE], dim=2)
    mask_BT = torch.cat([torch.zeros(2, padding), torch.ones(2, tokens)], dim=1)
    found, thresholds, totals, start = [], [], None, 0
    for piece in [*pieces, *[tokens + padding] * (sum(pieces) < tokens + padding)]:
        part_LBTE = s_LBTE[:, :, start : start + piece]
        if part_LBTE.shape[2] == 0:
            break
        pacer.begin(mask_BT[:, start : start + piece], totals)
        counts_LBT, lowest = run(pacer, part_LBTE)
        found.append(counts_LBT)
        thresholds.append(lowest)
        after_BTC = pacer.totals()
        assert after_BTC is not None
        totals = after_BTC[:, -1]
        start += piece
    assert torch.equal(torch.cat(found, -1)[..., padding:], whole_LBT)
    assert torch.allclose(torch.cat(thresholds, -1)[..., padding:], lowest_LBT, atol=1e-5)


def test_outside_of_a_call_nothing_is_paced() -> None:
    pacer = Pacer(LAYERS, FIRST_TOKENS)
    assert pacer.lowest(0, 4) is None
    pacer.begin(torch.ones(1, 4))
    assert pacer.lowest(0, 3) is None
    pacer.end()
    assert pacer.lowest(0, 4) is None
    pacer.free(torch.tensor([[0, 1, 2, 0]]))
    assert pacer.lowest(0, 4).tolist() == [-torch.inf, -torch.inf, 0, -torch.inf]  # type: ignore[union-attr]


def test_what_was_spent_goes_where_keys_go() -> None:
    layer = SpentExperts()  # type: ignore[no-untyped-call]
    assert layer.newest() is None
    layer.append(torch.arange(12, dtype=torch.int32).view(2, 2, 3))
    layer.append(torch.full((2, 1, 3), 20, dtype=torch.int32))
    assert layer.get_seq_length() == 3
    layer.crop(-1)
    layer.reorder_cache(torch.tensor([1, 0]))  # type: ignore[arg-type]
    newest = layer.newest()
    assert newest is not None
    assert newest.tolist() == [[9, 10, 11], [3, 4, 5]]
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([2]))
    newest = layer.newest()
    assert newest is not None
    assert newest.tolist() == [[3, 4, 5]]
    layer.reset()
    assert layer.newest() is None


@pytest.fixture
def paced(open_tiny: OpenTiny, tmp_path: Path) -> PreTrainedModel:
    """A random model whose scores drift: it wants far more experts than it was set to."""
    checkpoint = open_tiny("gemma3_text")
    conversions = random_conversions(
        checkpoint, shared=8, experts=10, top_k=2, selection="threshold"
    )
    folder = write_converted(checkpoint, tmp_path / "converted", conversions)
    return load_converted(folder).double()


def counted(model: PreTrainedModel, calls: list[dict[str, Tensor]], cache: object) -> Tensor:
    """Experts of every token in every layer, (L, B, T), over some calls with one cache."""
    rows: list[list[Tensor]] = [[] for _ in ffns_of(model)]
    handles = []
    for row, ffn in zip(rows, ffns_of(model), strict=True):

        def note(module: Any, inputs: tuple[Tensor], row: list[Tensor] = row) -> None:
            routing = module.routing(inputs[0].flatten(0, 1))
            row.append(routing.counts_T().view(inputs[0].shape[:2]))

        handles.append(ffn.register_forward_pre_hook(note))
    with torch.no_grad():
        for call in calls:
            model(**call, past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(row, dim=1) for row in rows])


IDS = torch.randint(1, 250, (2, 20), generator=torch.Generator().manual_seed(3))


def test_decoding_selects_what_a_prefill_does(paced: PreTrainedModel) -> None:
    whole_LBT = counted(paced, [{"input_ids": IDS}], DynamicCache(config=paced.config))
    steps = [{"input_ids": IDS[:, :7]}, *({"input_ids": IDS[:, t : t + 1]} for t in range(7, 20))]
    assert torch.equal(counted(paced, steps, DynamicCache(config=paced.config)), whole_LBT)
    static = StaticCache(config=paced.config, max_cache_len=32)
    assert torch.equal(counted(paced, steps, static), whole_LBT)
    assert (whole_LBT[..., :FIRST_TOKENS] == 10).all()


def test_pacing_lowers_what_a_threshold_alone_selects(paced: PreTrainedModel) -> None:
    used = {}
    for slope in (0.0, 5.0):
        pacer = ffns_of(paced)[0].pace[0]  # type: ignore[index]
        layers = [replace(each, slope=slope) for each in pacer.layers]
        pacer.layers, pacer._constants_device = tuple(layers), None
        with count_usage(paced) as usage, torch.no_grad():
            paced(IDS)
        used[slope] = sum(layer.experts_per_token for layer in usage.summary())
    assert used[5.0] < used[0.0] - 0.5


def test_padding_changes_nothing(paced: PreTrainedModel) -> None:
    whole_LBT = counted(paced, [{"input_ids": IDS}], DynamicCache(config=paced.config))
    pad = torch.full((2, 3), 258)
    mask_BT = torch.cat([torch.zeros(2, 3), torch.ones(2, 20)], dim=1).long()
    padded = {"input_ids": torch.cat([pad, IDS], dim=1), "attention_mask": mask_BT}
    first = {"input_ids": padded["input_ids"][:, :9], "attention_mask": mask_BT[:, :9]}
    rest = [
        {"input_ids": padded["input_ids"][:, t : t + 1], "attention_mask": mask_BT[:, : t + 1]}
        for t in range(9, 23)
    ]
    for calls in ([padded], [first, *rest]):
        found_LBT = counted(paced, calls, DynamicCache(config=paced.config))
        assert torch.equal(found_LBT[..., 3:], whole_LBT)


def generate(model: Any, ids_BT: Tensor, **values: Any) -> Tensor:
    found: Tensor = model.generate(ids_BT, **values)
    return found


def test_beams_and_sampling_keep_their_own_pace(paced: PreTrainedModel) -> None:
    mask_BT = torch.ones_like(IDS)
    beams = generate(paced, IDS, attention_mask=mask_BT, num_beams=3, max_new_tokens=5)
    alone = [
        generate(paced, row[None], attention_mask=mask_BT[:1], num_beams=3, max_new_tokens=5)
        for row in IDS
    ]
    for row, one in zip(beams, alone, strict=True):
        assert row[: one.shape[1]].tolist() == one[0].tolist()


def test_packed_texts_are_not_one_sequence(paced: PreTrainedModel) -> None:
    positions_BT = torch.cat([torch.arange(12), torch.arange(8)])[None].expand(2, -1)
    calls = [{"input_ids": IDS, "position_ids": positions_BT}]
    found_LBT = counted(paced, calls, DynamicCache(config=paced.config))
    first_T = positions_BT[0] < FIRST_TOKENS
    assert (found_LBT[..., first_T] == 10).all()
    assert not (found_LBT[..., ~first_T] == 10).all()


def test_a_cache_without_a_history_is_no_start(paced: PreTrainedModel) -> None:
    cache = DynamicCache(config=paced.config)
    counted(paced, [{"input_ids": IDS[:, :6]}], cache)
    assert isinstance(cache.layers.pop(), SpentExperts)
    found_LBT = counted(paced, [{"input_ids": IDS[:, 6:]}], cache)
    assert not (found_LBT[..., :FIRST_TOKENS] == 10).all()


def test_a_server_shows_no_sequences(
    paced: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its rows look like: their first tokens are known by place, the rest is not paced."""
    monkeypatch.setattr(Pacer, "begin", lambda *_: pytest.fail("rows were taken for sequences"))
    positions_BT = torch.arange(20)[None].expand(2, -1)
    seen: list[Tensor] = []
    ffns_of(paced)[1].register_forward_pre_hook(
        lambda module, inputs: seen.append(module.routing(inputs[0].flatten(0, 1)).counts_T())
    )
    with torch.no_grad():
        paced.base_model(
            input_ids=IDS, position_ids=positions_BT, use_cache=False, attention_instances={}
        )
    counts_BT = seen[0].view(2, 20)
    assert (counts_BT[:, :FIRST_TOKENS] == 10).all()
    assert not (counts_BT[:, FIRST_TOKENS:] == 10).all()
