"""Pacing in steps of a server: the state of a sequence is found wherever it was computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from weaver.models.pacing import PacedLayer, Pacer
from weaver.serving.pacing import BatchPacer, current_batch

LAYERS = [PacedLayer(3.0, 4.0, 8, 0.5), PacedLayer(2.0, 2.5, 16, 0.7), PacedLayer(4.0, 4.0, 8, 0.2)]
FIRST, EARLY, BLOCK = 2, 5, 4


def scores(sequence: int, length: int) -> Tensor:
    """Router scores of a sequence's tokens in every layer, (L, T, E)."""
    generator = torch.Generator().manual_seed(sequence)
    return torch.randn(len(LAYERS), length, 6, generator=generator) + 0.3


def run(pacer: Pacer | BatchPacer, scores_LTE: Tensor) -> Tensor:
    """Thresholds that layers ask for, one after the other, (L, T)."""
    found = []
    for index, scores_TE in enumerate(scores_LTE):
        lowest_T = pacer.lowest(index, scores_TE.shape[0])
        assert lowest_T is not None
        found.append(lowest_T)
        pacer.record(index, (scores_TE > lowest_T[:, None]).sum(1))
    return torch.stack(found)


def alone(scores_LTE: Tensor) -> Tensor:
    """The same of one sequence at once, as transformers runs it."""
    pacer = Pacer(LAYERS, FIRST, EARLY)
    pacer.begin(torch.ones(1, scores_LTE.shape[1]))
    return run(pacer, scores_LTE)


def context(parts: list[tuple[int, int, list[int]]]) -> SimpleNamespace:
    """What vLLM says of a step: tokens before, tokens now and blocks of every sequence."""
    lengths = [now for _, now, _ in parts]
    slots = [
        blocks[place // BLOCK] * BLOCK + place % BLOCK
        for before, now, blocks in parts
        for place in range(before, before + now)
    ]
    metadata = SimpleNamespace(
        query_start_loc=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int(),
        seq_lens=torch.tensor([before + now for before, now, _ in parts], dtype=torch.int32),
        block_table=torch.tensor([blocks for _, _, blocks in parts], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
    )
    return SimpleNamespace(attn_metadata={"layer": metadata})


def test_chunks_and_decoding_beside_each_other_pace_as_whole_sequences() -> None:
    whole = [scores(0, 11), scores(1, 9)]
    blocks = [[7, 2, 5], [3, 9, 1]]
    pacer = BatchPacer(LAYERS, FIRST, EARLY, 64)
    found: list[list[Tensor]] = [[], []]
    # (sequence, from, to): a chunk alone, a chunk beside a prompt, then single tokens.
    steps = [[(0, 0, 3)], [(1, 0, 7), (0, 3, 9)], [(0, 9, 10), (1, 7, 8)], [(1, 8, 9), (0, 10, 11)]]
    for step in steps:
        parts = [(begin, end - begin, blocks[which]) for which, begin, end in step]
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in step])
        pacer.begin(positions, current_batch(context(parts), BLOCK))
        row = torch.cat([whole[which][:, begin:end] for which, begin, end in step], dim=1)
        # Tokens of no sequence may fill a step up.
        lowest = run(pacer, torch.cat([row, row.new_zeros(len(LAYERS), 2, 6)], dim=1))
        pacer.end()
        place = 0
        for which, begin, end in step:
            found[which].append(lowest[:, place : place + end - begin])
            place += end - begin
    for which in range(2):
        torch.testing.assert_close(torch.cat(found[which], dim=1), alone(whole[which]))


def test_a_sequence_goes_on_from_blocks_that_another_one_computed() -> None:
    first = scores(0, 8)
    second = torch.cat([first[:, :4], scores(1, 5)], dim=1)
    pacer = BatchPacer(LAYERS, FIRST, EARLY, 64)
    pacer.begin(torch.arange(8), current_batch(context([(0, 8, [6, 4, 0])]), BLOCK))
    run(pacer, first)
    pacer.end()
    # The first block is shared, and so the state behind it.
    pacer.begin(torch.arange(4, 9), current_batch(context([(4, 5, [6, 8, 2])]), BLOCK))
    torch.testing.assert_close(run(pacer, second[:, 4:]), alone(second)[:, 4:])


def test_without_known_sequences_thresholds_are_calibrated_and_first_tokens_free() -> None:
    pacer = BatchPacer(LAYERS, FIRST, EARLY, 8)
    pacer.begin(torch.tensor([0, 1, 2, 0]), current_batch(SimpleNamespace(attn_metadata=None), 4))
    expected = torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf])
    for index in range(len(LAYERS)):
        assert torch.equal(pacer.lowest(index, 4), expected)
        pacer.record(index, torch.tensor([6, 6, 6, 6]))
    pacer.end()


def test_slots_that_lie_in_other_blocks_are_refused() -> None:
    with pytest.raises(RuntimeError, match="do not lie in blocks of 8"):
        current_batch(context([(3, 2, [7, 2, 5])]), 8)
