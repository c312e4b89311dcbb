"""Tables of two levels: the experts of a layer in one row."""

from __future__ import annotations

from weaver.cli.show_two_level import by_level


def test_rows_of_a_dense_model_stay() -> None:
    rows = [{"layer": 0, "active": 3}, {"layer": 1, "active": 5}]
    assert by_level(rows) == rows


def test_experts_are_merged_by_hand() -> None:
    """Of three experts one stayed dense; the means are over the other two."""
    rows = [
        {"layer": 0, "experts": 3, "sparsity": 0.5, "speed": {"1": 1.0}},
        {"layer": 1, "part": "expert 0", "experts": 3, "sparsity": 0.5, "speed": {"1": 1.0}},
        {"layer": 1, "part": "expert 1", "experts": 0, "sparsity": 0.0, "speed": {"1": 9.0}},
        {"layer": 1, "part": "expert 2", "experts": 3, "sparsity": 0.2, "speed": {"1": 2.0}},
        {"layer": 1, "part": "shared expert", "experts": 4, "sparsity": 0.1, "speed": {"1": 3.0}},
    ]
    dense, experts, shared = by_level(rows)
    assert dense == rows[0]
    assert experts["layer"] == "1: 3 experts, 1 of them dense"
    assert (experts["experts"], experts["sparsity"], experts["speed"]) == (3, 0.35, {"1": 1.5})
    assert shared["layer"] == "1: shared expert"
    assert shared["sparsity"] == 0.1


def test_experts_of_two_layers_are_two_rows() -> None:
    rows = [{"layer": layer, "part": f"expert {e}"} for layer in (3, 4) for e in (0, 1)]
    assert [row["layer"] for row in by_level(rows)] == ["3: 2 experts", "4: 2 experts"]
