"""Hidden states and logits in parts are those of the model's own forward."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weaver.models.head import CPU_LOGIT_BYTES, chunk_tokens, final_hidden, project, vocabulary


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(49_152, 160), (CPU_LOGIT_BYTES // 4, 1), (CPU_LOGIT_BYTES, 1)],
)
def test_a_chunk_fills_the_limit_and_holds_a_token(
    model: LlamaForCausalLM, tokens: int, expected: int
) -> None:
    model.config.vocab_size = tokens
    assert vocabulary(model) == tokens
    assert chunk_tokens(model) == expected


def test_gradients_of_parts_are_those_of_the_whole(model: LlamaForCausalLM) -> None:
    ids_BT = torch.arange(12).view(2, 6)
    logits_BTV = model(ids_BT).logits
    logits_BTV.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    hidden_ND = final_hidden(model, ids_BT).flatten(0, 1)
    parts = [project(model, hidden_CD) for hidden_CD in hidden_ND.split(5)]
    torch.testing.assert_close(torch.cat(parts), logits_BTV.flatten(0, 1))
    torch.stack([part.square().sum() for part in parts]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_bare_backbone_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="LlamaModel is not a causal LM"):
        final_hidden(model.base_model, torch.arange(4)[None])  # type: ignore[arg-type]
