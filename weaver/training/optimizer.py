"""Choice of the trained parameters, groups of AdamW, and learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW

from weaver.config.finetuning import PhaseConfig
from weaver.errors import WeaverError
from weaver.training.balance import routed_layers

BETAS = (0.9, 0.95)
FINAL_LR_SHARE = 0.1
# What the parameters of adapters are called, in PEFT and in ``weaver.training.adapters``.
ADAPTER_MARK = ".lora_"


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int, schedule: Literal["cosine", "constant"] = "cosine"
) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to 10% or constant.

    (s + 1) / W                                              for s < W,
    0.1 + 0.45 * (1 + cos(pi * (s - W) / (n - W - 1)))       after it, 0.1 at the last step,
    1                                                        after it, if constant.

    Args:
        step: s, counted from 0.
        steps: n, steps in all.
        warmup_steps: W.
        schedule: what follows the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps - 1)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def trained_names(model: nn.Module, phase: PhaseConfig) -> list[str]:
    """Names of the parameters that a phase trains as they are, adapters left out.

    Args:
        model: the model, with or without adapters.
        phase: what is trained.
    """
    wanted = _choices(model)
    kinds: list[str] = [phase.trainable]
    if phase.trainable == "lora":
        assert phase.lora is not None, "the phase is not resolved"
        kinds = [*phase.lora.also]
    return [
        name
        for name, _ in model.named_parameters()
        if ADAPTER_MARK not in name and any(wanted[kind](name) for kind in kinds)
    ]


def select_trainable(model: nn.Module, phase: PhaseConfig) -> dict[str, nn.Parameter]:
    """Freeze what is not to be trained and return the rest by name.

    Args:
        model: the model, with the adapters of the phase; ``requires_grad`` of every parameter is
            set.
        phase: all weights, the parameters of the routers, or adapters and what goes with them.

    Raises:
        ValueError: a chosen parameter has fewer bits than float32.
        WeaverError: the model has no such parameter.
    """
    names = set(trained_names(model, phase))
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in names or ADAPTER_MARK in name
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise WeaverError(
            f"the model has 0 {phase.trainable} parameters to train",
            why="a static layout (flap, wanda-sp) has no routed experts and so no router",
            fix="rerun with --set finetune.trainable=all",
        )
    for name, parameter in chosen.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(f"{name} is {parameter.dtype}: train in float32, cast when saving")
    return chosen


def build_optimizer(parameters: Mapping[str, nn.Parameter], phase: PhaseConfig) -> AdamW:
    """AdamW with three groups: router scales, matrices, and vectors.

    Weight decay applies to the matrices alone: a norm's weight and a bias have no scale to shrink
    (the experts' constants are biases too, one row per expert), and a router scale pulled to 0
    would undo what it learnt. ``peak_lr`` of a group is its rate at the end of the warm-up.
    """
    scales = [p for name, p in parameters.items() if name.endswith("router.scale")]
    rest = {n: p for n, p in parameters.items() if not n.endswith("router.scale")}
    matrices = {n for n, p in rest.items() if p.ndim >= 2 and not n.endswith(".expert_bias")}
    groups = [
        (scales, phase.router_scale_learning_rate, 0.0),
        ([p for n, p in rest.items() if n in matrices], phase.learning_rate, phase.weight_decay),
        ([p for n, p in rest.items() if n not in matrices], phase.learning_rate, 0.0),
    ]
    return AdamW(
        [
            {"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for members, rate, decay in groups
            if members
        ],
        betas=BETAS,
    )


def _choices(model: nn.Module) -> dict[str, Callable[[str], bool]]:
    """Map each word of ``trainable`` and of ``lora.also`` to a test of a parameter's name."""
    routers = tuple(f"{name}.router." for name in routed_layers(model))
    return {
        "all": lambda _name: True,
        "router": lambda name: name.startswith(routers),
        "router-scale": lambda name: name.startswith(routers) and name.endswith(".scale"),
        "norms": lambda name: any("norm" in part for part in name.split(".")),
    }
