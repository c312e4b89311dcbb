"""Phases with a guard: adapters, distillation, best weights, early stops, and resuming it all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from weaver.artifacts.store import read_tensors
from weaver.config.finetuning import FinetuneConfig
from weaver.config.loading import parse_config
from weaver.errors import WeaverError
from weaver.training.guard import Evaluation, Guard, HeldOut
from weaver.training.loop import DivergedError, TrainingReport, finetune
from weaver.training.loss import training_loss
from weaver.training.trainer import StepReport

ModelFactory = Callable[..., LlamaForCausalLM]
Evaluate = Callable[[PreTrainedModel], HeldOut]
SHORT = {"objective": "next-token", "batch_size": 2, "warmup_steps": 1}
PHASES: list[dict[str, Any]] = [
    {**SHORT, "trainable": "router", "steps": 3, "learning_rate": 0.05},
    {
        **SHORT,
        "trainable": "lora",
        "objective": "distill",
        "distill_weight": 0.5,
        "steps": 5,
        "learning_rate": 0.02,
        "lora": {"rank": 2, "dropout": 0.1, "also": ["router", "norms"]},
    },
    {**SHORT, "objective": "distill", "steps": 3, "learning_rate": 0.01, "schedule": "constant"},
]


class InterruptionError(Exception):
    """Exception that interrupts a training in these tests."""


def config_of(phases: list[dict[str, Any]], **values: Any) -> FinetuneConfig:
    given = {"phases": phases, "evaluate_every": 2, "checkpoint_every": 2, **values}
    return parse_config(FinetuneConfig, given, source="test")


@pytest.fixture
def dense(make_model: ModelFactory) -> LlamaForCausalLM:
    """A teacher: the same model before something was done to its FFNs."""
    return make_model().requires_grad_(False)


def pupil(make_model: ModelFactory, *, static: bool = False) -> LlamaForCausalLM:
    model = make_model(static=static)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_weight.mul_(0.3)
    return model


def measure(dense: PreTrainedModel, windows_WT: Tensor) -> Evaluate:
    def held_out(model: PreTrainedModel) -> HeldOut:
        assert not model.training
        with torch.no_grad():
            kl = training_loss(model, windows_WT, teacher=dense).item()
            nll = [training_loss(each, windows_WT).exp().item() for each in (model, dense)]
        return HeldOut(nll[0], kl, nll[1])

    return held_out


def run(
    model: LlamaForCausalLM,
    windows_WT: Tensor,
    folder: Path,
    config: FinetuneConfig,
    dense: LlamaForCausalLM,
    **rest: Any,
) -> TrainingReport:
    evaluate = rest.pop("evaluate", measure(dense, windows_WT))
    return finetune(
        model,
        [windows_WT] * len(config.phases or [config]),
        config,
        seed=3,
        checkpoint_dir=folder,
        teacher=dense,
        guard=Guard(evaluate, config.evaluate_every, config.best_by, config.patience),
        **rest,
    )


def stop_at(step: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise InterruptionError

    return on_step


def test_distillation_brings_the_model_back(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    # Without routing, whose choices are not smooth in the weights.
    dense = make_model(static=True).requires_grad_(False)
    model = pupil(make_model, static=True)
    phase = {"objective": "distill", "steps": 60, "learning_rate": 3e-4}
    seen: list[Evaluation] = []
    config = config_of([phase], evaluate_every=20)
    report = run(model, windows_WT, tmp_path, config, dense, on_evaluation=seen.append)
    assert [each.step for each in seen] == [0, 20, 40, 60]
    assert report.evaluations == tuple(seen)
    assert report.best is not None
    assert report.best.held_out.kl < 0.1 * seen[0].held_out.kl
    assert report.losses[0] == pytest.approx(seen[0].held_out.kl, rel=0.5)
    assert measure(dense, windows_WT)(model) == report.best.held_out


def test_the_phases_one_after_the_other(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    model, before = pupil(make_model), pupil(make_model)
    report = run(model, windows_WT, tmp_path, config_of(PHASES), dense)
    assert report.phase_steps == (3, 5, 3)
    assert report.tokens == 11 * 2 * 12
    assert len(report.losses) == 11
    assert [(e.phase, e.step) for e in report.evaluations] == [
        *((0, 0), (0, 2), (0, 3)),
        *((1, 5), (1, 7), (1, 8)),
        *((2, 10), (2, 11)),
    ]
    assert model.state_dict().keys() == before.state_dict().keys()
    assert not model.training
    assert report.best is not None
    assert measure(dense, windows_WT)(model) == report.best.held_out
    assert report.best.held_out.kl == min(e.held_out.kl for e in report.evaluations)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 8, 9, 10])
def test_resume_equals_an_undisturbed_run_bit_for_bit(
    make_model: ModelFactory,
    windows_WT: Tensor,
    tmp_path: Path,
    dense: LlamaForCausalLM,
    step: int,
) -> None:
    # Interrupted behind steps of every phase, best weights being newer than the checkpoint or not.
    config = config_of(PHASES, evaluate_every=1, checkpoint_every=3)
    undisturbed, resumed = pupil(make_model), pupil(make_model)
    expected = run(undisturbed, windows_WT, tmp_path / "a", config, dense)
    with pytest.raises(InterruptionError, match=r"^$"):
        run(pupil(make_model), windows_WT, tmp_path / "b", config, dense, on_step=stop_at(step))
    torch.manual_seed(999)
    report = run(resumed, windows_WT, tmp_path / "b", config, dense)
    assert report.resumed_from == step // 3 * 3
    assert report.losses == expected.losses
    assert report.evaluations == expected.evaluations
    assert report.best == expected.best
    assert report.phase_steps == expected.phase_steps
    wanted = undisturbed.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def scripted(*values: float) -> tuple[Evaluate, list[dict[str, Tensor]]]:
    """Evaluations with given KLs, and the weights that they saw."""
    states: list[dict[str, Tensor]] = []

    def evaluate(model: PreTrainedModel) -> HeldOut:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return HeldOut(10.0, values[len(states) - 1], 9.0)

    return evaluate, states


def test_the_best_weights_are_the_result(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    evaluate, states = scripted(0.5, 0.4, 0.6, 0.45)
    model = make_model()
    config = config_of([{**SHORT, "steps": 6, "learning_rate": 0.01}])
    report = run(model, windows_WT, tmp_path, config, dense, evaluate=evaluate)
    assert report.best is not None
    assert report.best.step == 2
    assert len(report.losses) == 6
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[1][name]), name
    assert not torch.equal(states[3]["model.norm.weight"], states[1]["model.norm.weight"])
    best = tmp_path / "best-00000002.safetensors"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [best.name, "step-00000006.safetensors"]
    assert "model.layers.0.mlp.router.balance_bias" in read_tensors(best)[0]


def test_a_training_that_only_harms_changes_nothing(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    evaluate, states = scripted(0.1, 0.2, 0.3)
    model = make_model()
    config = config_of([{**SHORT, "steps": 4}])
    report = run(model, windows_WT, tmp_path, config, dense, evaluate=evaluate)
    assert report.best is not None
    assert report.best.step == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[0][name]), name


def test_patience_ends_a_phase_and_the_next_starts_from_the_best(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    evaluate, states = scripted(0.5, 0.4, 0.6, 0.6, 0.3)
    second = {**SHORT, "steps": 1, "learning_rate": 1e-12, "balance_update": 0}
    config = config_of([{**SHORT, "steps": 50}, second], patience=2)
    report = run(make_model(), windows_WT, tmp_path, config, dense, evaluate=evaluate)
    assert report.phase_steps == (6, 1)
    name = "model.layers.0.mlp.router.balance_bias"
    assert torch.equal(states[4][name], states[1][name])
    assert not torch.equal(states[4][name], states[3][name])


def test_a_loss_that_is_not_finite_leaves_the_best_weights(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    model = pupil(make_model)
    evaluate, states = scripted(0.5, 0.4, 0.6)
    repeated = scripted_until(evaluate, 4)

    def spoil(report: StepReport) -> None:
        if report.step == 5:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("inf"))

    config = config_of([PHASES[0], PHASES[1]])
    with pytest.raises(DivergedError, match="loss is nan at step 3 of 5") as error:
        run(model, windows_WT, tmp_path, config, dense, evaluate=repeated, on_step=spoil)
    assert error.value.fix == "set learning_rate: 0.005 in phase 2 and rerun with --force"
    assert error.value.best is not None
    assert error.value.best.step == 2
    assert model.state_dict().keys() == states[1].keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[1][name]), name
    assert (tmp_path / "step-00000004.safetensors").exists()


def scripted_until(evaluate: Evaluate, calls: int) -> Evaluate:
    """The scripted evaluations, and the last of them again and again."""
    seen: list[HeldOut] = []

    def repeat(model: PreTrainedModel) -> HeldOut:
        if len(seen) < calls - 1:
            seen.append(evaluate(model))
        return seen[-1]

    return repeat


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "held-out kl is nan after step 2 of 4"),
        (None, "logits are not finite, after step 2 of 4"),
    ],
)
def test_an_evaluation_that_means_nothing_is_a_divergence(
    make_model: ModelFactory,
    windows_WT: Tensor,
    tmp_path: Path,
    dense: LlamaForCausalLM,
    value: float | None,
    message: str,
) -> None:
    calls: list[None] = []

    def evaluate(_model: PreTrainedModel) -> HeldOut:
        calls.append(None)
        if len(calls) == 1:
            return HeldOut(10.0, 0.5, 9.0)
        if value is None:
            raise WeaverError("logits are not finite", why="", fix="")
        return HeldOut(10.0, value, 9.0)

    config = config_of([{**SHORT, "steps": 4}])
    with pytest.raises(DivergedError, match=message) as error:
        run(make_model(), windows_WT, tmp_path, config, dense, evaluate=evaluate)
    assert error.value.best is not None
    assert error.value.best.step == 0


def test_what_cannot_be_evaluated_before_the_training_is_no_divergence(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    def evaluate(_model: PreTrainedModel) -> HeldOut:
        raise WeaverError("vocabularies differ", why="", fix="")

    with pytest.raises(WeaverError, match="vocabularies differ") as error:
        run(make_model(), windows_WT, tmp_path, config_of([SHORT]), dense, evaluate=evaluate)
    assert not isinstance(error.value, DivergedError)


def test_a_checkpoint_of_other_evaluations_is_refused(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    config = config_of(PHASES)
    with pytest.raises(InterruptionError, match=r"^$"):
        run(make_model(), windows_WT, tmp_path, config, dense, on_step=stop_at(5))
    other = config_of([*PHASES[:2], {**PHASES[2], "steps": 4}], patience=7)
    with pytest.raises(WeaverError, match=r"\(patience None -> 7, phase 3 steps 3 -> 4\)"):
        run(make_model(), windows_WT, tmp_path, other, dense)


def test_misuse(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, dense: LlamaForCausalLM
) -> None:
    config = config_of(PHASES)
    with pytest.raises(ValueError, match="1 tensors of windows for 3 phases"):
        finetune(make_model(), [windows_WT], config, seed=0, checkpoint_dir=tmp_path, teacher=dense)
    with pytest.raises(ValueError, match="the objective distill needs a teacher"):
        finetune(make_model(), [windows_WT] * 3, config, seed=0, checkpoint_dir=tmp_path)
