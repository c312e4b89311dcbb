"""Tiny random models and a byte-level tokenizer for the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 260
BuildModel = Callable[..., PreTrainedModel]
BuildTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def build_tokenizer() -> BuildTokenizer:
    """Make a tokenizer with one token per byte; ``merges`` adds tokens, ``bos`` prepends BOS."""

    def build(
        *, merges: list[tuple[str, str]] | None = None, bos: bool = False, special: bool = True
    ) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate(alphabet)}
        names = ["<bos>", "<eos>"]
        vocabulary |= {name: len(vocabulary) + i for i, name in enumerate(names)}
        for left, right in merges or []:
            vocabulary[left + right] = len(vocabulary)
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
            )
        kwargs: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>"} if special else {}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)

    return build


@pytest.fixture
def tokenizer(build_tokenizer: BuildTokenizer) -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def build_llama() -> BuildModel:
    """Make a random Llama with weights large enough that positions and masks matter."""

    def build(*, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(seed)
        values: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
        }
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            LlamaConfig(**(values | overrides))
        )
        model.eval()
        return model

    return build


@pytest.fixture
def gemma2() -> PreTrainedModel:
    """A random Gemma 2: soft-capped logits, a sliding-window layer, eager attention."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            max_position_embeddings=256,
            initializer_range=0.3,
            final_logit_softcapping=3.0,
        )
    )
    model.eval()
    return model
