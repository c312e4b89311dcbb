"""The section of ``finetune``: phases, adapters, and the guard's settings."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from weaver.config.sections import DATA, WINDOW, Section


class AdapterConfig(Section):
    """Low-rank adapters: ``W + alpha / rank * B A``, merged into W when the phase ends.

    ``targets``: the attention's projections, the FFNs' three matrices (all experts and the shared
    part). ``also``: what is trained as it is, beside the adapters.
    """

    rank: int = Field(8, gt=0)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[Literal["attention", "ffn"], ...] = Field(("attention", "ffn"), min_length=1)
    also: tuple[Literal["router-scale", "router", "norms"], ...] = ("router-scale",)


class PhaseConfig(Section):
    """One phase of a fine-tuning: what is trained, toward what, how fast and for how long.

    ``distill_weight`` is w in ``w * KL + (1 - w) * next-token``, 1 if left out. ``tokens`` in the
    place of ``steps``: as many steps as read that many tokens. ``temperature``: every token uses
    all experts, weighted by a softmax of that temperature, for which the layout needs softmax
    weights. ``balance_loss`` is the factor of the loss that evens the experts' loads out.
    """

    trainable: Literal["all", "router", "lora"] = Field(
        "all", description="All weights, the routers alone, or low-rank adapters."
    )
    lora: AdapterConfig | None = None
    objective: Literal["distill", "next-token"] = Field(
        "distill", description="Learn the dense model's predictions, or the text's next token."
    )
    distill_weight: float | None = Field(None, gt=0, le=1)
    steps: int = Field(50, gt=0, description="Optimiser steps.")
    tokens: int | None = Field(None, gt=0)
    batch_size: int = Field(4, gt=0, description="Windows per step.")
    sequence_length: int = Field(256, gt=1, description=WINDOW)
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    router_scale_learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    balance_update: float = Field(1e-3, ge=0)
    balance_loss: float = Field(0.0, ge=0)
    temperature: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _every_option_counts(self) -> Self:
        if not self._is_whole():
            return self
        if self.distill_weight is not None and self.objective != "distill":
            raise ValueError("distill_weight does nothing without objective: distill")
        if self.lora is not None and self.trainable != "lora":
            raise ValueError("lora does nothing without trainable: lora")
        if self.tokens is not None and "steps" in self.model_fields_set:
            raise ValueError("steps and tokens both say how long the phase is: give one of them")
        return self

    def _is_whole(self) -> bool:
        """Whether nothing else fills in what is left out here."""
        return True

    def resolved(self) -> PhaseConfig:
        """The phase with every default filled in and its length in steps."""
        steps = self.steps
        if self.tokens is not None:
            steps = math.ceil(self.tokens / (self.batch_size * self.sequence_length))
        values = {name: getattr(self, name) for name in PhaseConfig.model_fields}
        values |= {"steps": steps, "tokens": None}
        if self.objective == "distill":
            values["distill_weight"] = self.distill_weight or 1.0
        if self.trainable == "lora":
            values["lora"] = self.lora or AdapterConfig()
        return PhaseConfig(**values)


class FinetuneConfig(PhaseConfig):
    """A short fine-tuning of the converted model: one phase, several, or a preset's.

    Beside ``preset`` the keys of a phase that are given replace the preset's, in each of its
    phases; beside ``phases``, which say everything themselves, they are refused. On
    ``eval_windows`` windows of ``eval_data`` the model is compared with the dense one every
    ``evaluate_every`` steps; the weights with the lowest ``best_by`` are the result. Left out,
    ``eval_data`` are windows spread over ``data``, which are not trained on. A phase ends after
    ``patience`` evaluations without a new best (None: never). ``precision`` is that of matrix
    products; "auto" is bfloat16 where the device is fast at it. Weights are trained in float32.
    """

    data: tuple[str, ...] = Field(("builtin:calibration",), min_length=1, description=DATA)
    preset: Literal["cmoe-2k", "distill-2k", "dive", "downcycle"] | None = Field(
        None, description="Phases that are known to work; other flags replace their values."
    )
    phases: tuple[PhaseConfig, ...] | None = Field(None, min_length=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_data: tuple[str, ...] | None = Field(None, min_length=1)
    eval_windows: int = Field(4, gt=0)
    eval_sequence_length: int = Field(256, gt=1)
    evaluate_every: int = Field(10, gt=0)
    best_by: Literal["kl", "perplexity"] = "kl"
    patience: int | None = Field(None, gt=0)
    checkpoint_every: int = Field(10, gt=0, description="Steps between checkpoints.")

    @model_validator(mode="after")
    def _one_source_of_phases(self) -> Self:
        given = [name for name in PhaseConfig.model_fields if name in self.model_fields_set]
        if self.phases is not None and self.preset is not None:
            raise ValueError("preset and phases both say what the phases are: give one of them")
        if self.phases is not None and given:
            raise ValueError(f"{', '.join(given)} beside phases: set it in each phase")
        return self

    def _is_whole(self) -> bool:
        return self.preset is None
