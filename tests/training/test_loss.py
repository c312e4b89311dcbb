"""The chunked losses equal those of the models' own logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from weaver.training.loss import training_loss


def gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(1)
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        # So low that leaving the cap out changes the loss visibly.
        final_logit_softcapping=0.05,
        initializer_range=0.3,
    )
    model = Gemma2ForCausalLM(config)
    model.eval()
    return model


def plain_loss(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT).logits.float()
    return functional.cross_entropy(
        logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]), ids_BT[:, 1:].reshape(-1)
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 1000])
def test_loss_and_gradients_equal_the_plain_ones(
    make_model: Callable[..., LlamaForCausalLM],
    windows_WT: Tensor,
    family: str,
    tokens_per_chunk: int,
) -> None:
    model: PreTrainedModel = make_model() if family == "llama" else gemma2()
    expected = plain_loss(model, windows_WT)
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    loss = training_loss(model, windows_WT, chunk=tokens_per_chunk)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], msg=name)


def test_logits_stay_within_the_limit(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    model = make_model()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[0]))
    training_loss(model, windows_WT, chunk=10)
    assert rows == [10] * 6 + [6]


def test_windows_of_one_token_predict_nothing(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    with pytest.raises(ValueError, match=r"windows of 1 token\(s\) predict nothing"):
        training_loss(make_model(), torch.zeros(2, 1, dtype=torch.int64))


def float64_losses(model: PreTrainedModel, dense: PreTrainedModel, ids_BT: Tensor) -> list[float]:
    """KL and next-token loss from the models' own logits, with sums in float64."""
    with torch.no_grad():
        log_q_BTV = model(input_ids=ids_BT).logits.double()[:, :-1].log_softmax(-1)
        log_p_BTV = dense(input_ids=ids_BT).logits.double()[:, :-1].log_softmax(-1)
    kl = (log_p_BTV.exp() * (log_p_BTV - log_q_BTV)).sum(-1).mean()
    next_token = -log_q_BTV.gather(-1, ids_BT[:, 1:, None]).mean()
    return [kl.item(), next_token.item()]


def softened(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Another model of the same shape."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.8).add_(0.05)
    return model


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 1000])
def test_distillation_and_its_gradients_equal_the_plain_ones(
    make_model: Callable[..., LlamaForCausalLM],
    windows_WT: Tensor,
    weight: float,
    tokens_per_chunk: int,
) -> None:
    model, dense = make_model(), softened(make_model)
    log_q_NV = model(input_ids=windows_WT).logits[:, :-1].reshape(-1, 40).log_softmax(-1)
    p_NV = dense(input_ids=windows_WT).logits[:, :-1].reshape(-1, 40).softmax(-1).detach()
    kl = (p_NV * (p_NV.log() - log_q_NV)).sum(-1).mean()
    next_token = -log_q_NV.gather(-1, windows_WT[:, 1:].reshape(-1, 1)).mean()
    (weight * kl + (1 - weight) * next_token).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    loss = training_loss(
        model,
        windows_WT,
        teacher=dense,
        distill_weight=weight,
        chunk=tokens_per_chunk,
    )
    loss.backward()
    exact = float64_losses(model, dense, windows_WT)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(weight * exact[0] + (1 - weight) * exact[1], rel=1e-5)
    for name, gradient in gradients.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, msg=name)
    assert all(parameter.grad is None for parameter in dense.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_share_a_trained_head_under_autocast(tied: bool, windows_WT: Tensor) -> None:
    # Autocast keeps one 16-bit copy of a trained weight, which then is in every chunk's graph.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model, dense = LlamaForCausalLM(config), LlamaForCausalLM(config).requires_grad_(False)
    gradients = []
    for tokens_per_chunk in (7, 1000):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(model, windows_WT, teacher=dense, chunk=tokens_per_chunk)
        loss.backward()
        gradient = model.lm_head.weight.grad
        assert gradient is not None
        gradients.append(gradient.clone())
    assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()


class FixedLogits(nn.Module):
    """A head that gives the same logits everywhere."""

    def __init__(self, logits_V: list[float]) -> None:
        super().__init__()
        self.logits_V = nn.Parameter(torch.tensor(logits_V))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.logits_V + 0 * hidden_ND[:, :1]


def test_distillation_by_hand(
    make_model: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - (ln 3) / 2; its gradient by the logits is q - p.
    model, dense = make_model(), make_model()
    head = FixedLogits([0.0, math.log(3)])
    for each, its_head in ((model, head), (dense, FixedLogits([0.0, 0.0]))):
        monkeypatch.setattr(each, "get_output_embeddings", lambda its_head=its_head: its_head)
    ids_BT = torch.tensor([[0, 1, 1], [1, 1, 0]])
    kl, next_token = math.log(2) - math.log(3) / 2, (3 * -math.log(0.75) + math.log(4)) / 4

    loss = training_loss(model, ids_BT, teacher=dense)
    loss.backward()
    mixed = training_loss(model, ids_BT, teacher=dense, distill_weight=0.75)

    assert loss.item() == pytest.approx(kl)
    assert mixed.item() == pytest.approx(0.75 * kl + 0.25 * next_token)
    assert head.logits_V.grad is not None
    assert head.logits_V.grad.tolist() == pytest.approx([-0.25, 0.25])


def test_a_model_is_at_no_distance_from_itself(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    loss = training_loss(make_model(), windows_WT, teacher=make_model())
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_soft_caps_of_both_models_count(windows_WT: Tensor) -> None:
    model, dense = gemma2(), gemma2()
    with torch.no_grad():
        dense.lm_head.weight.mul_(-1.0)
    expected = float64_losses(model, dense, windows_WT)[0]
    assert training_loss(model, windows_WT, teacher=dense).item() == pytest.approx(expected, 1e-4)


def test_logits_of_each_model_stay_within_the_limit(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    model, dense = make_model(), make_model()
    rows: list[int] = []
    for each in (model, dense):
        each.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[0]))
    training_loss(model, windows_WT, teacher=dense, chunk=10)
    assert rows == [10] * 12 + [6] * 2


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_a_weight_out_of_range(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor, weight: float
) -> None:
    with pytest.raises(ValueError, match=rf"distill_weight={weight} is not in \(0, 1\]"):
        training_loss(make_model(), windows_WT, teacher=make_model(), distill_weight=weight)


def test_another_vocabulary_is_refused(
    make_model: Callable[..., LlamaForCausalLM], windows_WT: Tensor
) -> None:
    dense = make_model()
    dense.config.vocab_size = 41
    with pytest.raises(ValueError, match="vocabularies of 40 and 41 tokens differ"):
        training_loss(make_model(), windows_WT, teacher=dense)
