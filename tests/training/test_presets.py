"""Presets, phases, and what a configuration may not say."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from weaver.config.finetuning import AdapterConfig, FinetuneConfig, PhaseConfig
from weaver.config.loading import parse_config
from weaver.errors import WeaverError
from weaver.training.presets import PRESETS, resolve_phases, resolved_config


def parse(**values: Any) -> FinetuneConfig:
    return parse_config(FinetuneConfig, values, source="test")


def test_the_names_that_are_written_out_are_the_table() -> None:
    annotation = FinetuneConfig.model_fields["preset"].annotation
    assert set(get_args(get_args(annotation)[0])) == PRESETS.keys()
    assert all(name == preset.name for name, preset in PRESETS.items())


def test_a_flat_section_is_one_phase() -> None:
    (phase,) = resolve_phases(parse(steps=7, learning_rate=1e-4))
    assert phase == PhaseConfig(steps=7, learning_rate=1e-4, distill_weight=1.0)
    assert type(phase) is PhaseConfig


def test_defaults_are_filled_in() -> None:
    lora_phase = {"trainable": "lora", "objective": "next-token"}
    distill, lora, tokens = resolve_phases(
        parse(phases=[{}, lora_phase, {"tokens": 4 * 256 * 3 + 1}])
    )
    assert (distill.objective, distill.distill_weight) == ("distill", 1.0)
    assert lora.lora == AdapterConfig()
    assert lora.distill_weight is None
    assert (tokens.steps, tokens.tokens) == (4, None)


def test_cmoe_2k_is_the_papers() -> None:
    (phase,) = resolve_phases(parse(preset="cmoe-2k"))
    assert phase.lora == AdapterConfig(rank=8, alpha=32, dropout=0.1)
    assert phase.lora.targets == ("attention", "ffn")
    assert phase.lora.also == ("router-scale",)
    assert phase.steps * phase.batch_size == 2048
    assert phase.sequence_length == 2048
    assert (phase.learning_rate, phase.router_scale_learning_rate) == (5.95e-5, 1e-3)
    assert (phase.balance_update, phase.weight_decay) == (1e-3, 0.0)


def test_distill_2k_reads_as_much() -> None:
    (phase,) = resolve_phases(parse(preset="distill-2k"))
    assert phase.steps * phase.batch_size * phase.sequence_length == 2048 * 2048
    assert (phase.trainable, phase.objective, phase.distill_weight) == ("lora", "distill", 1.0)


def test_keys_beside_a_preset_replace_its_own() -> None:
    (phase,) = resolve_phases(parse(preset="distill-2k", steps=20, distill_weight=0.5))
    (plain,) = resolve_phases(parse(preset="distill-2k"))
    assert phase == plain.model_copy(update={"steps": 20, "distill_weight": 0.5})
    (shorter,) = resolve_phases(parse(preset="distill-2k", tokens=2048 * 8))
    assert shorter.steps == 1


def test_a_key_that_does_nothing_in_a_preset_is_refused() -> None:
    with pytest.raises(WeaverError, match=r"preset cmoe-2k: .* does nothing without objective"):
        resolve_phases(parse(preset="cmoe-2k", distill_weight=0.5))
    with pytest.raises(WeaverError, match="lora does nothing without trainable: lora"):
        resolve_phases(parse(preset="cmoe-2k", trainable="all"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"objective": "next-token", "distill_weight": 0.5},
            "distill_weight does nothing without objective: distill",
        ),
        ({"objective": "distill", "distill_weight": 0.0}, "distill_weight: .* greater than 0"),
        ({"objective": "distill", "distill_weight": 1.1}, "distill_weight: .* less than or equal"),
        ({"lora": {"rank": 4}}, "lora does nothing without trainable: lora"),
        ({"steps": 5, "tokens": 500}, "steps and tokens both say how long"),
        ({"phases": []}, "phases: .* at least 1 item"),
        ({"phases": [{}], "preset": "cmoe-2k"}, "preset and phases both say"),
        ({"phases": [{}], "steps": 5}, "steps beside phases: set it in each phase"),
        ({"phases": [{"lora": {}}]}, r"phases\.0: .*lora does nothing"),
        ({"preset": "unknown"}, "preset: Input should be 'cmoe-2k'"),
        ({"patience": 0}, "patience: .* greater than 0"),
        ({"trainable": "lora", "lora": {"targets": []}}, r"lora\.targets: .* at least 1 item"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(WeaverError, match=message):
        parse(**values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"preset": "cmoe-2k", "patience": 3},
        {"phases": [{"trainable": "router"}, {"objective": "distill", "tokens": 9999}]},
    ],
)
def test_what_is_recorded_is_a_configuration_of_the_same_phases(values: dict[str, Any]) -> None:
    config = parse(**values)
    phases = resolve_phases(config)
    recorded = resolved_config(config, phases, "float32")
    again = parse(**recorded)
    assert resolve_phases(again) == phases
    assert resolved_config(again, phases, "float32") == recorded
    assert again.patience == config.patience
