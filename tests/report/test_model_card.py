"""The model card: front matter that parses, facts that appear."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from weaver.report.model_card import LayerFacts, ModelCardFacts, model_card

WIDE = LayerFacts(
    intermediate_size=100, num_shared_neurons=40, num_routed_experts=6, expert_width=10, top_k=2
)
NARROW = replace(WIDE, num_shared_neurons=70, num_routed_experts=3, top_k=1)
FACTS = ModelCardFacts(
    name="tiny-cmoe",
    base_model="models/tiny",
    method="cmoe",
    method_source="arXiv:2502.04416",
    router="glu",
    layers=(WIDE, WIDE, NARROW, WIDE),
    total_parameters=134_600_000,
    active_parameters=110_000_000,
    dense_parameters=134_500_000,
    recipe={"model": {"path": "models/tiny"}, "partition": {"method": "cmoe", "sparsity": 0.35}},
    weaver_version="0.1.0",
)


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    parsed = yaml.safe_load(matter)
    assert isinstance(parsed, dict)
    return parsed


def test_front_matter_parses() -> None:
    facts = replace(FACTS, license="apache-2.0", base_model_id="org/tiny")
    assert front_matter(model_card(facts)) == {
        "license": "apache-2.0",
        "base_model": "org/tiny",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["weaver", "moe"],
    }


def test_unknown_licence_and_local_model_are_left_out_and_said() -> None:
    card = model_card(FACTS)
    assert not {"license", "base_model"} & set(front_matter(card))
    assert "licence of the base model was not recorded" in card
    assert "was not recorded" not in model_card(replace(FACTS, license="mit"))


def test_sparsity_by_hand() -> None:
    # Active of 100: 60, 60, 80 and 60, so 260 of 400.
    assert FACTS.ffn_sparsity == pytest.approx(0.35)
    assert (NARROW.shared_share, NARROW.active_share) == pytest.approx((0.7, 0.8))


def test_the_mean_of_a_threshold_is_said_to_be_one() -> None:
    facts = replace(FACTS, layers=(WIDE, replace(WIDE, selection="threshold")))
    cells = re.findall(r"\| +6 x 10 +\| +([^|]+?) +\| +60.0% +\|", model_card(facts))
    assert cells == ["2", "2 on average"]
    assert facts.ffn_sparsity == pytest.approx(0.4)


def test_facts_appear() -> None:
    card = model_card(FACTS)
    rows = dict(re.findall(r"^\| (\S.*?) +\| +(\S.*?) +\|$", card, flags=re.MULTILINE))
    assert rows["base model"] == "models/tiny"
    assert rows["method"] == "cmoe (arXiv:2502.04416)"
    assert rows["router"] == "glu"
    assert rows["FFN sparsity"] == "35.0%"
    assert rows["parameters"] == "135M"
    assert rows["parameters active per token"] == "110M"
    assert rows["made with"] == "weaver 0.1.0"
    assert card.startswith("---\n")
    assert "# tiny-cmoe\n" in card


def test_layout_joins_equal_neighbours() -> None:
    lines = model_card(FACTS).partition("## Layout\n")[2].splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert cells[2:] == [
        ["0-1", "100", "40", "40.0%", "6 x 10", "2", "60.0%"],
        ["2", "100", "70", "70.0%", "3 x 10", "1", "80.0%"],
        ["3", "100", "40", "40.0%", "6 x 10", "2", "60.0%"],
    ]


def test_code_and_recipe_are_whole() -> None:
    card = model_card(FACTS)
    code, recipe = (
        re.search(r"```python\n(.*?)```", card, re.S),
        re.search(r"```yaml\n(.*?)```", card, re.S),
    )
    assert code is not None
    assert recipe is not None
    imported = [n for n in ast.parse(code[1]).body if isinstance(n, ast.Import)]
    assert imported[0].names[0].name == "weaver"
    assert yaml.safe_load(recipe[1]) == FACTS.recipe


def test_static_and_trained_models_say_so() -> None:
    static = replace(
        FACTS, method="flap", router=None, layers=(replace(WIDE, num_routed_experts=0, top_k=0),)
    )
    assert "A static pruning of models/tiny" in model_card(static)
    assert "none: the same neurons are active" in model_card(static)
    assert "trained for 50 steps only" in model_card(replace(FACTS, finetune_steps=50))
    assert "not trained after the conversion" in model_card(FACTS)


def test_results_stand_only_where_there_are_some() -> None:
    assert "## Results" not in model_card(FACTS)
    card = model_card(replace(FACTS, results={"perplexity": "24.1 (dense 20.1)"}))
    assert re.search(r"\| perplexity \| 24\.1 \(dense 20\.1\) \|", card)


def test_names_are_text_whatever_they_hold() -> None:
    evil = "x\n# Licence: MIT\n<script>alert(1)</script> [free](http://x) ```\x1b[2J"
    recipe = {"model": {"path": f"{evil}\n```\n<script>"}}
    facts = replace(FACTS, name=evil, base_model=evil, results={evil: evil}, recipe=recipe)
    card = model_card(facts)
    body, fenced = card.partition("## Recipe\n")[::2]
    assert "<script>" not in body
    assert "\x1b" not in card
    assert not re.search(r"^# Licence", card, re.MULTILINE)
    assert not re.search(r"(?<!\\)\[free", body)
    fence = re.search(r"^(`{4,})yaml\n(.*?)^\1$", fenced, re.MULTILINE | re.DOTALL)
    assert fence is not None
    assert yaml.safe_load(fence[2]) == recipe
    assert "<script>" not in fenced.replace(fence[0], "")
