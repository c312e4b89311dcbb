"""Interleaved timing with a clock that the test moves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from fake_clock import Clock
from hypothesis import given
from hypothesis import strategies as st

from weaver.kernels import timing
from weaver.kernels.timing import Timing, interleave


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    value = Clock()
    monkeypatch.setattr(timing, "perf_counter", value)
    return value


def sleeper(clock: Clock, calls: list[str], name: str, seconds: list[float]) -> Callable[[], None]:
    durations = iter(seconds)

    def run() -> None:
        calls.append(name)
        clock.sleep(next(durations))

    return run


def test_interleave_alternates_and_leaves_the_warmup_out(clock: Clock) -> None:
    calls: list[str] = []
    timings = interleave(
        {
            "a": sleeper(clock, calls, "a", [100, 100, 3, 1, 2]),
            "b": sleeper(clock, calls, "b", [100, 100, 5, 5, 8]),
        },
        repeats=3,
        warmup=2,
    )
    assert calls == ["a", "b"] * 5
    assert timings["a"].seconds == pytest.approx((3, 1, 2))
    assert (timings["a"].median, timings["b"].median) == pytest.approx((2, 5))


@pytest.mark.parametrize(("seconds", "timed"), [(0.5, 1), (25.0, 1), (41.0, 2), (1000.0, 4)])
def test_no_round_begins_after_the_budget(clock: Clock, seconds: float, timed: int) -> None:
    calls: list[str] = []
    functions = {name: sleeper(clock, calls, name, [10.0] * 5) for name in "ab"}
    timings = interleave(functions, repeats=4, warmup=1, seconds=seconds)
    assert len(timings["a"].seconds) == len(timings["b"].seconds) == timed
    assert len(calls) == 2 * (1 + timed)


def test_prepare_runs_before_every_run_and_is_not_timed(clock: Clock) -> None:
    calls: list[str] = []
    timings = interleave(
        {name: sleeper(clock, calls, name, [2.0, 2.0]) for name in "ab"},
        repeats=1,
        warmup=1,
        prepare={name: sleeper(clock, calls, f"prepare {name}", [50.0, 50.0]) for name in "ab"},
    )
    assert calls == ["prepare a", "a", "prepare b", "b"] * 2
    assert timings["b"].seconds == pytest.approx((2.0,))


def test_quantiles_by_hand() -> None:
    values = Timing(tuple(float(i) for i in (11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)))
    assert (values.p10, values.median, values.p90) == pytest.approx((2, 6, 10))
    assert Timing((4.0, 1.0)).median == pytest.approx(2.5)
    assert Timing((4.0, 1.0, 2.0)).best == 1.0


@given(st.lists(st.floats(1e-9, 1e3), min_size=1))
def test_quantiles_are_ordered(seconds: list[float]) -> None:
    values = Timing(tuple(seconds))
    assert min(seconds) <= values.p10 <= values.median <= values.p90 <= max(seconds)


def test_garbage_collection_is_off_while_timing_and_restored() -> None:
    assert gc.isenabled()
    states: list[bool] = []
    interleave({"a": lambda: states.append(gc.isenabled())}, repeats=2, warmup=0)
    assert states == [False, False]
    assert gc.isenabled()

    def fail() -> None:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        interleave({"a": fail}, repeats=1, warmup=0)
    assert gc.isenabled()


def test_interleave_needs_a_round() -> None:
    with pytest.raises(ValueError, match="repeats=0 must be positive"):
        interleave({}, repeats=0, warmup=0)
    with pytest.raises(ValueError, match="warmup=-1 not negative"):
        interleave({}, repeats=1, warmup=-1)


def test_a_ratio_is_that_of_the_same_rounds() -> None:
    # The machine was four times as slow in the second round.
    dense, moe = Timing((2.0, 8.0, 2.0)), Timing((1.0, 4.0, 1.25))
    assert dense.ratio_to(moe) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        dense.ratio_to(Timing((1.0, 1.0)))
