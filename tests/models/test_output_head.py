"""Hidden states and logits in parts are those of the model's own forward."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_same_gradients
from tiny_models import random_ids, tiny_model
from torch import nn

from weaver.models.output_head import (
    CPU_LOGIT_BYTES,
    LOGIT_BYTES,
    chunk_tokens,
    final_hidden,
    project,
    vocabulary,
)


@pytest.mark.parametrize(
    ("device", "tokens", "expected"),
    [
        ("cpu", 49_152, 160),
        ("cpu", CPU_LOGIT_BYTES // 4, 1),
        ("cpu", CPU_LOGIT_BYTES, 1),
        ("meta", 49_152, 682),
        ("meta", LOGIT_BYTES, 1),
    ],
)
def test_a_chunk_fills_the_limit_and_holds_a_token(device: str, tokens: int, expected: int) -> None:
    model = tiny_model("llama")
    nn.Module.to(model, device)
    model.config.vocab_size = tokens
    assert vocabulary(model) == tokens
    assert chunk_tokens(model) == expected


# Gemma 2 caps its logits.
@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_gradients_of_parts_are_those_of_the_whole(variant: str) -> None:
    model, ids_BT = tiny_model(variant), random_ids(2, 6)
    logits_BTV = model(ids_BT).logits
    logits_BTV.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    hidden_ND = final_hidden(model, ids_BT).flatten(0, 1)
    parts = [project(model, hidden_CD) for hidden_CD in hidden_ND.split(5)]
    torch.testing.assert_close(torch.cat(parts), logits_BTV.flatten(0, 1))
    torch.stack([part.square().sum() for part in parts]).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(found, expected)


def test_a_bare_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel is not a causal LM"):
        final_hidden(tiny_model("llama").base_model, random_ids(1, 4))  # type: ignore[arg-type]
