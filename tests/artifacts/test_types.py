"""Types of the tensors that stages exchange: refused values and derived properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weaver.artifacts.types import Compensation, ExpertLayout, LayerProfile, Router


def layout(**changes: Any) -> ExpertLayout:
    values: dict[str, Any] = {
        "intermediate_size": 10,
        "top_k": 2,
        "shared_S": torch.tensor([9, 0, 4]),
        "experts_EN": torch.tensor([[1, 2], [8, 3], [5, 7]]),
    }
    return ExpertLayout(**values | changes)


def test_a_layout_by_hand() -> None:
    found = layout()
    assert found.num_shared_neurons == 3
    assert (found.num_routed_experts, found.expert_width) == (3, 2)
    assert found.active_neurons == 3 + 2 * 2
    assert found.ffn_sparsity == pytest.approx(0.3)
    assert found.permutation.tolist() == [9, 0, 4, 1, 2, 8, 3, 5, 7]


def test_a_static_layout() -> None:
    found = layout(top_k=0, experts_EN=torch.zeros(0, 0, dtype=torch.int64))
    assert (found.num_routed_experts, found.expert_width, found.active_neurons) == (0, 0, 3)
    assert found.ffn_sparsity == pytest.approx(0.7)
    assert found.permutation.tolist() == [9, 0, 4]


def test_a_threshold_counts_with_its_mean() -> None:
    found = layout(selection="threshold")
    assert found.active_neurons == 7
    assert found.ffn_sparsity == pytest.approx(0.3)
    assert found.scalars() == {
        "intermediate_size": 10,
        "top_k": 2,
        "selection": "threshold",
        "weighting": "unit",
        "routed_scaling": 1.0,
        "overlap": False,
    }
    assert ExpertLayout.build(found.tensors(), found.scalars()).selection == "threshold"
    assert layout().selection == "top-k"


def test_experts_that_overlap() -> None:
    """Neurons 1, 2 and 3 stand in two experts, 6 and 7 in none."""
    experts_EN = torch.tensor([[1, 2, 3], [2, 3, 5], [1, 5, 8]])
    bias_ED = torch.ones(3, 4)
    found = layout(experts_EN=experts_EN, top_k=1, overlap=True, expert_bias_ED=bias_ED)
    assert found.permutation.tolist() == [9, 0, 4, 1, 2, 3, 2, 3, 5, 1, 5, 8]
    assert found.active_neurons == 6
    assert found.ffn_sparsity == pytest.approx(0.4)
    again = ExpertLayout.build(found.tensors(), found.scalars())
    assert again.overlap
    assert again.expert_bias_ED is bias_ED
    assert found.skips
    # As many neurons as the dense FFN has, and not the same.
    assert layout(experts_EN=torch.arange(1, 8)[None], top_k=1, shared_S=NONE_S).skips
    assert not layout(top_k=3, experts_EN=EVERY_EN, shared_S=torch.tensor([9])).skips
    assert layout(top_k=3, experts_EN=EVERY_EN, shared_S=torch.tensor([9]), overlap=True).skips


EVERY_EN = torch.arange(9).view(3, 3)
NONE_S = torch.zeros(0, dtype=torch.int64)
NONE_EN = torch.zeros(0, 0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_S": torch.tensor([1])}, "a neuron is assigned twice"),
        ({"shared_S": torch.tensor([0, 0])}, "a neuron is assigned twice"),
        ({"shared_S": torch.tensor([10])}, r"neuron id outside 0\.\.9"),
        ({"shared_S": torch.tensor([-1])}, r"neuron id outside 0\.\.9"),
        ({"top_k": 0}, r"top_k=0 outside 1\.\.3"),
        ({"top_k": 4}, r"top_k=4 outside 1\.\.3"),
        ({"top_k": 1, "experts_EN": NONE_EN}, r"top_k=1 outside 0\.\.0"),
        ({"top_k": 0, "experts_EN": NONE_EN, "shared_S": NONE_S}, "layout holds no neuron"),
        ({"selection": "top-p"}, "selection 'top-p' is not one of"),
        (
            {"top_k": 0, "experts_EN": NONE_EN, "selection": "threshold"},
            "selection 'threshold' of a layout without routed experts",
        ),
        (
            {"top_k": 0, "experts_EN": NONE_EN, "weighting": "softmax"},
            "weighting 'softmax' of a layout without routed experts",
        ),
        (
            {"selection": "threshold", "weighting": "softmax"},
            "softmax weights of experts that are selected by threshold",
        ),
        ({"overlap": True, "shared_S": torch.tensor([1])}, "a neuron is assigned twice"),
        (
            {"overlap": True, "experts_EN": torch.tensor([[1, 2], [3, 3], [5, 6]])},
            "a neuron is assigned twice",
        ),
        ({"expert_bias_ED": torch.ones(2, 4)}, "expert_bias_ED needs one row per expert"),
        ({"weighting": "sigmoid"}, "weighting 'sigmoid' is not one of"),
        ({"routed_scaling": 2.0}, r"routed_scaling=2\.0 of experts with weight 1"),
        ({"weighting": "softmax", "routed_scaling": 0.0}, r"routed_scaling=0\.0 is not positive"),
        ({"shared_S": torch.tensor([[0]])}, "shared_S is a vector, experts_EN a matrix"),
        ({"experts_EN": torch.tensor([1, 2])}, "shared_S is a vector, experts_EN a matrix"),
    ],
)
def test_what_is_no_layout(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout(**changes)


@given(st.data())
def test_layout_properties(data: st.DataObject) -> None:
    experts, width = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    shared = data.draw(st.integers(0 if experts else 1, 6))
    dropped = data.draw(st.integers(0, 3))
    total = shared + experts * width + dropped
    order = torch.tensor(data.draw(st.permutations(range(total))))
    routed = order[shared : shared + experts * width]
    top_k = data.draw(st.integers(1, experts)) if experts else 0
    found = ExpertLayout(
        total, top_k, order[:shared], routed.reshape(experts, width if experts else 0)
    )
    assert sorted(found.permutation.tolist()) == sorted(order[: total - dropped].tolist())
    assert found.ffn_sparsity == pytest.approx(1 - (shared + top_k * width) / total)
    assert ExpertLayout.build(found.tensors(), found.scalars()).permutation.equal(found.permutation)


def router(**changes: Any) -> Router:
    values: dict[str, Any] = {
        "kind": "linear",
        "weight_ED": torch.ones(3, 4),
        "scale_E": torch.zeros(3),
        "balance_bias_E": torch.zeros(3),
    }
    return Router(**values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cubic"}, "router kind 'cubic' is not one of"),
        ({"kind": "glu"}, "router kind 'glu' and up_weight_ED do not agree"),
        ({"up_weight_ED": torch.ones(3, 4)}, "router kind 'linear' and up_weight_ED do not agree"),
        ({"scale_E": torch.zeros(4)}, "one value per expert"),
        ({"scale_E": torch.zeros(3, 1)}, "one value per expert"),
        ({"balance_bias_E": torch.zeros(2)}, "one value per expert"),
        ({"kind": "glu", "up_weight_ED": torch.ones(3, 5)}, "differ in shape"),
        ({"bias_E": torch.zeros(4)}, "the intercept needs one value per expert"),
        ({"bias_E": torch.zeros(3, 1)}, "the intercept needs one value per expert"),
        (
            {"kind": "glu", "up_weight_ED": torch.ones(3, 4), "bias_E": torch.zeros(3)},
            "router kind 'glu' has no intercept bias_E",
        ),
        ({"weighting": "sum"}, "weighting 'sum' is not one of"),
        ({"weighting": "softmax", "routed_scaling": math.inf}, "routed_scaling=inf is not"),
    ],
)
def test_what_is_no_router(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "a compensation without a tensor compensates nothing"),
        ({"down_FD": torch.ones(4)}, r"down_FD of shape \(4,\)"),
        ({"output_bias_D": torch.ones(1, 4)}, r"output_bias_D of shape \(1, 4\)"),
        ({"output_bias_D": torch.ones(0)}, r"output_bias_D of shape \(0,\)"),
        ({"expert_bias_ED": torch.ones(4)}, r"expert_bias_ED of shape \(4,\)"),
        ({"expert_bias_ED": torch.ones(0, 4)}, r"expert_bias_ED of shape \(0, 4\)"),
        ({"down_FD": torch.ones(6, 4), "output_bias_D": torch.ones(5)}, "hidden sizes differ"),
        ({"down_FD": torch.ones(6, 4), "expert_bias_ED": torch.ones(2, 6)}, "hidden sizes differ"),
        ({"output_bias_D": torch.ones(4), "expert_bias_ED": torch.ones(4, 2)}, "sizes differ"),
    ],
)
def test_what_is_no_compensation(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compensation(**changes)


def test_a_compensation_of_one_tensor_each() -> None:
    shapes = {"down_FD": (6, 4), "output_bias_D": (4,), "expert_bias_ED": (2, 4)}
    for name, shape in shapes.items():
        assert list(Compensation(**{name: torch.ones(shape)}).tensors()) == [name]
    assert set(Compensation(*map(torch.ones, shapes.values())).tensors()) == set(shapes)


def test_tensors_and_scalars() -> None:
    assert set(router().tensors()) == {"weight_ED", "scale_E", "balance_bias_E"}
    assert router().scalars() == {
        "kind": "linear",
        "weighting": "unit",
        "routed_scaling": 1.0,
        "threshold_slope": 0.0,
        "early_experts": 0.0,
        "late_experts": 0.0,
    }
    again = Router.build({**router().tensors(), "of_another_version": NONE_S}, {"kind": "linear"})
    assert again.up_weight_ED is None
    # As routers were written before there was a choice.
    assert (again.weighting, again.routed_scaling) == ("unit", 1.0)
    weighted = router(weighting="softmax", routed_scaling=1.5)
    assert Router.build(weighted.tensors(), weighted.scalars()).routed_scaling == 1.5
    with pytest.raises(TypeError, match="weight_ED"):
        Router.build({}, {"kind": "linear"})


def test_the_statistics_a_profile_derives() -> None:
    profile = LayerProfile(
        sample_gate_mean_MF=torch.zeros(2, 2),
        sample_gate_abs_mean_MF=torch.tensor([[1.0, 2.0], [5.0, 4.0]]),
        sample_tokens_M=torch.tensor([3, 1]),
        sample_groups_M=torch.tensor([0, 1]),
        hidden_mean_F=torch.tensor([2.0, -3.0]),
        hidden_variance_F=torch.tensor([0.5, 1.0]),
        marker_neurons_TA=torch.zeros(4, 1, dtype=torch.int32),
        ffn_inputs_ND=torch.zeros(4, 2),
        tokens=4,
    )
    assert profile.intermediate_size == 2
    assert profile.hidden_second_moment_F.tolist() == [4.5, 10.0]
    # (3 * 1 + 1 * 5) / 4 and (3 * 2 + 1 * 4) / 4.
    assert profile.gate_abs_mean_F.tolist() == [2.0, 2.5]
