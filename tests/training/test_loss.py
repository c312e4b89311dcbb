"""The chunked loss equals the cross entropy of the model's own logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from weaver.training.loss import next_token_loss


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

    loss = next_token_loss(model, windows_WT, logit_bytes=tokens_per_chunk * 4 * 40)
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
    next_token_loss(model, windows_WT, logit_bytes=10 * 4 * 40 + 3)
    assert rows == [10] * 6 + [6]


def test_windows_of_one_token_predict_nothing(
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    with pytest.raises(ValueError, match=r"windows of 1 token\(s\) predict nothing"):
        next_token_loss(make_model(), torch.zeros(2, 1, dtype=torch.int64))
