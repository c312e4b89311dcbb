"""The table of methods, and what holds for every method in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weaver.algorithms.glu import glu_forward
from weaver.artifacts.types import ExpertLayout
from weaver.errors import WeaverError
from weaver.methods.cmoe import CmoeOptions
from weaver.methods.layouts import strongest
from weaver.methods.registry import METHODS, get_method, get_router, resolve_options
from weaver.methods.routers import ROUTERS

# Ne, active experts, N, and neurons left over; at least 4 neurons for the 4 markers per token.
SLICES = st.integers(2, 6).flatmap(
    lambda experts: st.tuples(
        st.just(experts), st.integers(1, experts - 1), st.integers(2, 5), st.integers(0, 3)
    )
)
# Of methods that divide the neurons; experts that are prunings of the whole FFN overlap.
ROUTED = [name for name, spec in METHODS.items() if not spec.is_static and not spec.prunes_groups]


def split(problem: Any, name: str, seed: int) -> ExpertLayout:
    spec = METHODS[name]
    generator = torch.Generator().manual_seed(seed)
    return spec.partition(problem, resolve_options(spec, {}), generator)


@pytest.mark.parametrize("name", ROUTED)
@given(slices=SLICES, seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_layout_is_a_partition_of_the_wanted_size(
    random_problem: Any,
    name: str,
    slices: tuple[int, int, int, int],
    seed: int,
) -> None:
    experts, active_experts, width, leftover = slices
    neurons = experts * width + leftover
    active = leftover + width * active_experts
    problem, x_TD = random_problem(
        seed, neurons=neurons, active_neurons=active, num_experts=experts, expert_width=width
    )
    layout = split(problem, name, seed)
    assert layout.permutation.sort().values.tolist() == list(range(neurons))
    assert layout.active_neurons == active
    assert layout.expert_width == width
    assert 1 <= layout.top_k < layout.num_routed_experts
    for ids in (layout.shared_S, *layout.experts_EN):
        assert ids.tolist() == sorted(ids.tolist())
    again = split(problem, name, seed)
    assert torch.equal(layout.permutation, again.permutation)
    # With every expert active the split is the dense FFN.
    torch.testing.assert_close(
        glu_forward(x_TD, problem.weights.select(layout.permutation)),
        glu_forward(x_TD, problem.weights),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("name", [name for name, spec in METHODS.items() if spec.shared_scores])
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_the_shared_neurons_are_those_with_the_highest_shared_scores(
    random_problem: Any, name: str, seed: int
) -> None:
    spec = METHODS[name]
    slices = {} if spec.is_static else {"num_experts": 8, "expert_width": 4}
    problem, _ = random_problem(seed, neurons=32, active_neurons=24, **slices)
    shared_S = split(problem, name, seed).shared_S
    assert spec.shared_scores is not None
    scores_F = spec.shared_scores(problem, resolve_options(spec, {}))
    assert scores_F.shape == (32,)
    assert shared_S.numel() > 0
    assert torch.equal(shared_S, strongest(scores_F, shared_S.numel())[0])


def test_random_depends_on_the_seed(random_problem: Any) -> None:
    problem, _ = random_problem(0, neurons=32, active_neurons=16, num_experts=4, expert_width=8)
    first, second = split(problem, "random", 0), split(problem, "random", 1)
    assert not torch.equal(first.experts_EN, second.experts_EN)


def test_rows_agree_with_their_keys_and_the_papers() -> None:
    assert {name: spec.name for name, spec in METHODS.items()} == {name: name for name in METHODS}
    assert {name: spec.num_experts for name, spec in METHODS.items()} == {
        "weave": 16,
        "expertweaver": 64,
        "cmoe": 8,
        "dive": 4,
        "flap": None,
        "wanda-sp": None,
        "random": 8,
        "weight-kmeans": 8,
    }
    assert [name for name, spec in METHODS.items() if spec.sequential] == [
        "weave",
        "cmoe",
        "wanda-sp",
    ]
    assert [name for name, spec in METHODS.items() if spec.refit] == ["weave"]
    assert [name for name, spec in METHODS.items() if spec.constants] == ["weave", "dive"]
    assert [name for name, spec in METHODS.items() if spec.prunes_groups] == ["dive"]
    for spec in METHODS.values():
        assert (spec.router is None) == spec.is_static
        assert spec.router is None or spec.router in ROUTERS


def test_lookup() -> None:
    assert get_method("cmoe") is METHODS["cmoe"]
    assert get_router("mean-gate") is ROUTERS["mean-gate"]
    with pytest.raises(WeaverError, match="unknown method 'moe'") as caught:
        get_method("moe")
    assert (
        "weave, expertweaver, cmoe, dive, flap, wanda-sp, random, weight-kmeans" in caught.value.why
    )
    with pytest.raises(WeaverError, match="unknown router 'mean'") as caught:
        get_router("mean")
    assert "mean-gate, representative, ridge, error-ridge, random" in caught.value.why


def test_options_are_resolved_or_named() -> None:
    spec = get_method("cmoe")
    assert resolve_options(spec, {"iterations": 2}) == CmoeOptions(iterations=2)
    with pytest.raises(
        WeaverError, match=r"options of method cmoe: iterations: .*; tau: "
    ) as caught:
        resolve_options(spec, {"iterations": 0, "tau": 0.6})
    assert caught.value.why == "the options of cmoe are: shared_experts, iterations"
    with pytest.raises(WeaverError, match="options of method flap: tau: "):
        resolve_options(get_method("flap"), {"tau": 0.6})
