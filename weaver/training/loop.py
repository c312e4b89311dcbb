"""Fine-tuning of a converted model: AdamW on the next-token loss, resumable bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from weaver.config import FinetuneConfig
from weaver.errors import WeaverError
from weaver.training.balance import ExpertLoadCounter, routed_layers
from weaver.training.batches import batch_indices, step_seed
from weaver.training.checkpoint import (
    Progress,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    windows_digest,
)
from weaver.training.loss import next_token_loss

BETAS = (0.9, 0.95)
CLIP_NORM = 1.0
FINAL_LR_SHARE = 0.1

# What these say about the data is in the digest of the windows; the interval changes no weight.
_NOT_SETTINGS = {"data", "sequence_length", "checkpoint_every"}


@dataclass(frozen=True)
class TrainingReport:
    """What a training did.

    Args:
        losses: loss of every step in nats per token, before that step's update.
        tokens: tokens read, steps * batch size * T.
        seconds: time spent in steps, that of interrupted runs up to their checkpoint counted in.
        resumed_from: steps that were taken over from a checkpoint.
    """

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    resumed_from: int


def finetune(
    model: PreTrainedModel,
    windows_WT: Tensor,
    config: FinetuneConfig,
    *,
    seed: int,
    checkpoint_dir: Path,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingReport:
    """Train a model in place on packed windows of tokens.

    AdamW with betas (0.9, 0.95), gradients clipped to norm 1, the learning rates scaled by
    ``learning_rate_factor``; router scales have their own rate. After every step the balance bias
    of every router moves by ``config.balance_update`` toward equal load.

    A checkpoint found in ``checkpoint_dir`` is continued, and the weights at the end are those of
    an undisturbed run, bit for bit, on the same machine with the same thread count: batches and
    random numbers (dropout) depend on the seed and the step alone.

    Master weights are the model's own: load it in float32 and cast when saving. In bfloat16 most
    updates at usual rates are smaller than half a unit in the last place and would be lost.

    Args:
        model: the model, in float32; left in eval mode, with the frozen parameters frozen.
        windows_WT: token ids without padding, integer, (W, T).
        config: steps, rates and the rest.
        seed: order of the windows and dropout, not negative.
        checkpoint_dir: where checkpoints lie; the caller removes them when the result is saved.
        on_step: called with the number of steps done and the last loss, after its checkpoint.

    Returns:
        The report, over all steps.

    Raises:
        ValueError: windows that are not (W, T) with T > 1, or trained weights below float32.
        WeaverError: nothing to train, a loss that is not finite, or an unusable checkpoint.

    Source: CMoE, arXiv:2502.04416, fine-tuning (Adam betas, router scale rate, balance bias).
    Known deviation: all weights are trained, not low-rank adapters on them.
    """
    _check_windows(windows_WT)
    parameters = select_trainable(model, config.trainable)
    state = TrainingState(parameters, _balance_biases(model), build_optimizer(parameters, config))
    settings = {
        **config.model_dump(mode="json", exclude=_NOT_SETTINGS),
        "seed": seed,
        "windows": windows_digest(windows_WT),
    }
    start = progress = load_checkpoint(checkpoint_dir, state, settings)
    model.train()
    with ExitStack() as stack:
        stack.callback(model.eval)
        # Dropout draws from a seed per step; the caller's random state is given back at the end.
        stack.enter_context(torch.random.fork_rng(_cuda_devices(model)))
        loads = stack.enter_context(ExpertLoadCounter(model)) if config.balance_update else None
        for step in range(start.step, config.steps):
            began = time.perf_counter()
            ids_B = batch_indices(step, windows_WT.shape[0], config.batch_size, seed)
            torch.manual_seed(step_seed(seed, step))
            loss = _training_step(model, windows_WT[ids_B], state, config, step)
            if loads is not None:
                loads.apply(config.balance_update)
            seconds = progress.seconds + time.perf_counter() - began
            progress = Progress((*progress.losses, loss), seconds)
            if progress.step % config.checkpoint_every == 0:
                save_checkpoint(checkpoint_dir, state, progress, settings)
            if on_step is not None:
                on_step(progress.step, loss)
    tokens = progress.step * config.batch_size * windows_WT.shape[1]
    return TrainingReport(progress.losses, tokens, progress.seconds, start.step)


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to 10%.

    (s + 1) / W                                              for s < W,
    0.1 + 0.45 * (1 + cos(pi * (s - W) / (n - W - 1)))       after it, 0.1 at the last step.

    Args:
        step: s, counted from 0.
        steps: n, steps in all.
        warmup_steps: W.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps - 1)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def select_trainable(model: nn.Module, trainable: str) -> dict[str, nn.Parameter]:
    """Freeze what is not to be trained and return the rest by name.

    Args:
        model: the model; ``requires_grad`` of every parameter is set.
        trainable: "all", or "router" for the parameters of the routers alone.

    Raises:
        ValueError: a chosen parameter has fewer bits than float32.
        WeaverError: the model has no such parameter.
    """
    prefixes = tuple(f"{name}.router." for name in routed_layers(model))
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trainable == "all" or name.startswith(prefixes)
        if parameter.requires_grad:
            chosen[name] = parameter
    if not chosen:
        raise WeaverError(
            f"the model has 0 {trainable} parameters to train",
            why="a static layout (flap, wanda-sp) has no routed experts and so no router",
            fix="rerun with --set finetune.trainable=all",
        )
    for name, parameter in chosen.items():
        if torch.finfo(parameter.dtype).bits < 32:
            raise ValueError(f"{name} is {parameter.dtype}: train in float32, cast when saving")
    return chosen


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: FinetuneConfig) -> AdamW:
    """AdamW with three groups: router scales, matrices, and vectors.

    Weight decay applies to the matrices alone: a norm's weight and a bias have no scale to shrink
    (the experts' constants are biases too, one row per expert), and a router scale pulled to 0
    would undo what it learnt. ``peak_lr`` of a group is its rate at the end of the warm-up.
    """
    scales = [p for name, p in parameters.items() if name.endswith("router.scale")]
    rest = {n: p for n, p in parameters.items() if not n.endswith("router.scale")}
    matrices = {n for n, p in rest.items() if p.ndim >= 2 and not n.endswith(".expert_bias")}
    groups = [
        (scales, config.router_scale_learning_rate, 0.0),
        ([p for n, p in rest.items() if n in matrices], config.learning_rate, config.weight_decay),
        ([p for n, p in rest.items() if n not in matrices], config.learning_rate, 0.0),
    ]
    return AdamW(
        [
            {"params": members, "lr": rate, "peak_lr": rate, "weight_decay": decay}
            for members, rate, decay in groups
            if members
        ],
        betas=BETAS,
    )


def _training_step(
    model: PreTrainedModel, ids_BT: Tensor, state: TrainingState, config: FinetuneConfig, step: int
) -> float:
    factor = learning_rate_factor(step, config.steps, config.warmup_steps)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    state.optimizer.zero_grad(set_to_none=True)
    loss = next_token_loss(model, ids_BT.to(model.device, torch.int64))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise WeaverError(
            f"loss is {value} at step {step + 1} of {config.steps}",
            why=f"the training diverged at learning rate {config.learning_rate:g}",
            fix=f"rerun with --force --set finetune.learning_rate={config.learning_rate / 4:g}",
        )
    loss.backward()
    nn.utils.clip_grad_norm_(state.parameters.values(), CLIP_NORM)
    state.optimizer.step()
    return value


def _balance_biases(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.router.balance_bias": layer.router.balance_bias
        for name, layer in routed_layers(model).items()
    }


def _cuda_devices(model: PreTrainedModel) -> list[int]:
    device = model.device
    return [device.index or 0] if device.type == "cuda" else []


def _check_windows(windows_WT: Tensor) -> None:
    if windows_WT.ndim != 2 or windows_WT.shape[0] < 1 or windows_WT.shape[1] < 2:
        raise ValueError(f"windows of shape {tuple(windows_WT.shape)}, not (W, T) with T > 1")
    if windows_WT.is_floating_point():
        raise ValueError(f"windows of {windows_WT.dtype}, not token ids")
