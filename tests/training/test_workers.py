"""One process alone, and what two of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn

from weaver.training.balance import ExpertLoad
from weaver.training.batches import step_seed
from weaver.training.workers import Workers


@dataclass
class FakeState:
    """A process among others, as accelerate describes it."""

    process_index: int
    num_processes: int
    device: str = "cpu"


def worker(rank: int, count: int) -> Workers:
    state: Any = FakeState(rank, count)
    return Workers(state)


def test_alone_everything_stays_as_it_is() -> None:
    workers = Workers.join()
    assert (workers.count, workers.rank, workers.is_main) == (1, 0, True)
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    workers.add_gradients([parameter])
    assert parameter.grad.tolist() == [1, 2]
    loads = {"0": ExpertLoad(torch.tensor([3, 1]), 4)}
    added = workers.add_loads(loads)
    assert added["0"].counts_E.tolist() == [3, 1]
    assert added["0"].tokens == 4
    assert workers.agree("x") == "x"
    workers.wait()


@pytest.mark.parametrize(("windows", "count"), [(4, 2), (5, 2), (3, 3), (7, 4)])
def test_shares_are_the_batch(windows: int, count: int) -> None:
    ids_B = torch.randperm(windows, generator=torch.Generator().manual_seed(0))
    shares = [worker(rank, count).share(ids_B) for rank in range(count)]
    assert torch.cat(shares).equal(ids_B)
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_more_processes_than_windows() -> None:
    with pytest.raises(ValueError, match="a batch of 2 windows for 3 processes"):
        worker(0, 3).share(torch.arange(2))


def test_processes_draw_different_dropout() -> None:
    seeds = {step_seed(0, step, process) for step in range(3) for process in range(3)}
    assert len(seeds) == 9
    assert step_seed(0, 1, 0) == step_seed(0, 1)


def test_precision_is_that_of_products() -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with Workers(PartialState(), torch.bfloat16).autocast():
        assert (x @ weight.T).dtype == torch.bfloat16
    with Workers(PartialState()).autocast():
        assert (x @ weight.T).dtype == torch.float32
    assert Workers(PartialState(), torch.bfloat16).precision_name == "bfloat16"
