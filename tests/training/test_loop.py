"""The training loop: it learns, trains what it should, and resumes bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from weaver.config.finetuning import FinetuneConfig
from weaver.errors import WeaverError
from weaver.training.loop import TrainingReport, finetune
from weaver.training.optimizer import learning_rate_factor
from weaver.training.trainer import StepReport

ModelFactory = Callable[..., LlamaForCausalLM]
CONFIG = FinetuneConfig(
    objective="next-token",
    steps=7,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=2,
    checkpoint_every=2,
    weight_decay=0.1,
)


class InterruptionError(Exception):
    """Exception that interrupts a training in these tests."""


def stop_at(step: int) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.step == step:
            raise InterruptionError

    return on_step


def test_loss_falls_and_the_report_counts(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    seen: list[StepReport] = []
    report = finetune(
        make_model(),
        [windows_WT],
        CONFIG.model_copy(update={"steps": 60}),
        seed=0,
        checkpoint_dir=tmp_path,
        on_step=seen.append,
    )
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.losses[0] == pytest.approx(3.7, abs=0.3)  # ln 40 = 3.69
    assert report.tokens == 60 * 4 * 12
    assert report.seconds > 0
    assert report.resumed_from == 0
    assert [each.step for each in seen] == list(range(1, 61))
    assert tuple(each.loss for each in seen) == report.losses
    assert seen[0].learning_rate == pytest.approx(
        CONFIG.learning_rate * learning_rate_factor(0, 60, CONFIG.warmup_steps, CONFIG.schedule)
    )
    balances = [each.balance for each in seen if each.balance is not None]
    assert len(balances) == 60
    assert all(each.max_over_mean >= 1 and 0 <= each.idle < 1 for each in balances)
    assert all(each.tokens_per_second > 0 for each in seen)


def test_first_step_is_adamw_by_hand(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    # After one step both bias-corrected moments are g and g^2: the update is lr * g / (|g| + eps).
    update = {"steps": 1, "batch_size": 6, "warmup_steps": 0, "learning_rate": 1e-3}
    update |= {"router_scale_learning_rate": 0.5, "weight_decay": 0.0}
    config = CONFIG.model_copy(update=update)
    model, before = make_model(), make_model().state_dict()
    finetune(model, [windows_WT], config, seed=0, checkpoint_dir=tmp_path)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        rate = 0.5 if name.endswith("router.scale") else 1e-3
        expected = before[name] - rate * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    norm = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm()
    assert float(norm) <= 1.0 + 1e-5  # clipped


def run(
    model: LlamaForCausalLM,
    windows_WT: Tensor,
    folder: Path,
    config: FinetuneConfig,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainingReport:
    return finetune(model, [windows_WT], config, seed=3, checkpoint_dir=folder, on_step=on_step)


@pytest.mark.parametrize("trainable", ["all", "router"])
@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_resume_equals_an_undisturbed_run_bit_for_bit(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path, step: int, trainable: str
) -> None:
    config = CONFIG.model_copy(update={"trainable": trainable})
    undisturbed, resumed = make_model(dropout=0.2), make_model(dropout=0.2)
    expected = run(undisturbed, windows_WT, tmp_path / "a", config)
    with pytest.raises(InterruptionError, match=r"^$"):
        run(make_model(dropout=0.2), windows_WT, tmp_path / "b", config, stop_at(step))
    torch.manual_seed(999)  # a new process would have another random state
    report = run(resumed, windows_WT, tmp_path / "b", config)
    assert report.resumed_from == step // 2 * 2
    assert report.losses == expected.losses
    assert report.tokens == expected.tokens
    wanted = undisturbed.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    assert any(bool(b.any()) for n, b in resumed.named_buffers() if n.endswith("balance_bias"))


def test_a_second_interruption_goes_on_too(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    undisturbed, resumed = make_model(), make_model()
    run(undisturbed, windows_WT, tmp_path / "a", CONFIG)
    for step in (3, 5):
        with pytest.raises(InterruptionError, match=r"^$"):
            run(make_model(), windows_WT, tmp_path / "b", CONFIG, stop_at(step))
    assert run(resumed, windows_WT, tmp_path / "b", CONFIG).resumed_from == 4
    assert torch.equal(resumed.lm_head.weight, undisturbed.lm_head.weight)


def test_router_only_changes_the_routers_alone(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    model, before = make_model(), make_model().state_dict()
    config = CONFIG.model_copy(update={"trainable": "router"})
    run(model, windows_WT, tmp_path, config)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {
        f"model.layers.{layer}.mlp.router.{name}"
        for layer in (0, 1)
        for name in ("weight", "scale", "balance_bias")
    }
    assert not model.training


def test_balance_update_zero_leaves_the_bias(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    model = make_model()
    run(model, windows_WT, tmp_path, CONFIG.model_copy(update={"balance_update": 0.0}))
    biases = [b for n, b in model.named_buffers() if n.endswith("balance_bias")]
    assert len(biases) == 2
    assert not any(bool(bias.any()) for bias in biases)


def test_callers_random_state_is_kept(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    model = make_model(dropout=0.5)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(model, windows_WT, tmp_path, CONFIG)
    assert torch.equal(torch.rand(3), expected)


def test_static_model_trains_all_but_has_no_router(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    report = run(make_model(static=True), windows_WT, tmp_path / "all", CONFIG)
    assert report.losses[-1] < report.losses[0]
    config = CONFIG.model_copy(update={"trainable": "router"})
    with pytest.raises(WeaverError, match="0 router parameters to train") as error:
        run(make_model(static=True), windows_WT, tmp_path / "router", config)
    assert "finetune.trainable=all" in error.value.fix


def test_diverging_loss_is_an_error_and_keeps_the_checkpoint(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    model = make_model()

    def spoil(report: StepReport) -> None:
        if report.step == 3:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))

    with pytest.raises(WeaverError, match="loss is nan at step 4 of 7") as error:
        run(model, windows_WT, tmp_path, CONFIG, spoil)
    assert "--set finetune.learning_rate=0.0025" in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.safetensors"]


def test_low_precision_weights_are_refused(
    make_model: ModelFactory, windows_WT: Tensor, tmp_path: Path
) -> None:
    model = make_model()
    model.bfloat16()
    with pytest.raises(ValueError, match=r"torch\.bfloat16: train in float32, cast when saving"):
        run(model, windows_WT, tmp_path, CONFIG)


@pytest.mark.parametrize("shape", [(12,), (0, 12), (3, 1)])
def test_windows_of_a_wrong_shape(
    make_model: ModelFactory, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"windows of shape .* not \(W, T\) with T > 1"):
        run(make_model(), torch.zeros(shape, dtype=torch.int64), tmp_path, CONFIG)


def test_windows_of_floats(make_model: ModelFactory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"windows of torch\.float32, not token ids"):
        run(make_model(), torch.zeros(2, 4), tmp_path, CONFIG)
