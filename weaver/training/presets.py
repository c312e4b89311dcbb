"""The table of presets, and how a configuration becomes a list of phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weaver.config.finetuning import AdapterConfig, FinetuneConfig, PhaseConfig
from weaver.config.loading import parse_config

# 2,048 samples of 2,048 tokens.
TOKENS_2K = 2048 * 2048


@dataclass(frozen=True)
class Preset:
    """A fine-tuning under a name.

    Args:
        name: what ``finetune.preset`` says.
        summary: one line for the table in README.md.
        phases: what it does.
        source: arXiv id, or whose it is.
    """

    name: str
    summary: str
    phases: tuple[PhaseConfig, ...]
    source: str


# Deviations of cmoe-2k from the paper: the dropout of the FFN's adapters is one mask a step (see
# ``weaver.training.adapters``); batch size and schedule, which the paper leaves open, are 8 windows
# and constant. Of dive: the temperature, which the paper leaves open, is 1; the phases keep the
# ratio of 1 to 10 of its 0.5 and 5 billion tokens. Of downcycle: batches of 8 windows of 2,048
# tokens, not 1,024 of 4,096. Text with fewer windows than an epoch needs is read again.
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="cmoe-2k",
            summary="low-rank adapters and router scales, one epoch of 2,048 samples",
            phases=(
                PhaseConfig(
                    trainable="lora",
                    lora=AdapterConfig(rank=8, alpha=32.0, dropout=0.1, also=("router-scale",)),
                    objective="next-token",
                    tokens=TOKENS_2K,
                    batch_size=8,
                    sequence_length=2048,
                    learning_rate=5.95e-5,
                    router_scale_learning_rate=1e-3,
                    schedule="constant",
                    warmup_steps=0,
                    balance_update=1e-3,
                ),
            ),
            source="CMoE, arXiv:2502.04416",
        ),
        Preset(
            name="distill-2k",
            summary="low-rank adapters toward the dense model's predictions, 2,048 samples",
            phases=(
                PhaseConfig(
                    trainable="lora",
                    lora=AdapterConfig(rank=64, alpha=64.0),
                    objective="distill",
                    tokens=TOKENS_2K,
                    batch_size=8,
                    sequence_length=2048,
                    learning_rate=2e-3,
                    router_scale_learning_rate=1e-3,
                    warmup_steps=10,
                    balance_update=1e-3,
                ),
            ),
            source="weaver",
        ),
        Preset(
            name="dive",
            summary="routers on all experts, then adapters of experts, norms and routers",
            phases=(
                PhaseConfig(
                    trainable="router",
                    temperature=1.0,
                    objective="next-token",
                    tokens=TOKENS_2K // 10,
                    batch_size=8,
                    sequence_length=2048,
                    learning_rate=1e-4,
                    schedule="constant",
                    warmup_steps=0,
                    balance_update=0.0,
                ),
                PhaseConfig(
                    trainable="lora",
                    lora=AdapterConfig(
                        rank=8, alpha=16.0, targets=("ffn",), also=("router", "norms")
                    ),
                    objective="next-token",
                    tokens=TOKENS_2K,
                    batch_size=8,
                    sequence_length=2048,
                    learning_rate=1e-4,
                    warmup_steps=0,
                    balance_update=0.0,
                ),
            ),
            source="DIVE, arXiv:2506.09351",
        ),
        Preset(
            name="downcycle",
            summary="continued pretraining of all weights with a load-balancing loss",
            phases=(
                PhaseConfig(
                    objective="next-token",
                    tokens=16 * TOKENS_2K,
                    batch_size=8,
                    sequence_length=2048,
                    learning_rate=4e-4,
                    warmup_steps=100,
                    balance_loss=0.01,
                    balance_update=0.0,
                ),
            ),
            source="ExpertWeaver, arXiv:2602.15521",
        ),
    )
}


def resolve_phases(config: FinetuneConfig) -> tuple[PhaseConfig, ...]:
    """The phases of a configuration, with every default filled in and every length in steps.

    Without ``phases`` and ``preset`` the section itself is the one phase. Beside ``preset`` the
    keys of a phase that were given replace those of each of its phases.

    Raises:
        WeaverError: a given key does nothing in a phase of the preset.
    """
    if config.phases is not None:
        return tuple(phase.resolved() for phase in config.phases)
    if config.preset is None:
        return (config.resolved(),)
    given = {
        name: getattr(config, name)
        for name in PhaseConfig.model_fields
        if name in config.model_fields_set
    }
    return tuple(_overlay(phase, given, config.preset) for phase in PRESETS[config.preset].phases)


def resolved_config(
    config: FinetuneConfig, phases: Sequence[PhaseConfig], precision: str
) -> dict[str, Any]:
    """Return the configuration that the stage records, with precision and phases in full.

    Args:
        config: the section.
        phases: its phases, resolved.
        precision: what "auto" has come to.
    """
    shared = config.model_dump(mode="json", exclude={*PhaseConfig.model_fields, "preset", "phases"})
    values = {"precision": precision, "phases": [phase.model_dump(mode="json") for phase in phases]}
    return {**shared, **values}


def _overlay(phase: PhaseConfig, given: dict[str, Any], preset: str) -> PhaseConfig:
    values = {name: getattr(phase, name) for name in phase.model_fields_set}
    # Steps and tokens are two ways to say one thing: the one that is given goes for both.
    if given.get("tokens") is not None:
        values.pop("steps", None)
    elif "steps" in given:
        values.pop("tokens", None)
    return parse_config(PhaseConfig, values | given, source=f"preset {preset}").resolved()
