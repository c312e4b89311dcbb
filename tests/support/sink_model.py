"""A small model with an attention sink at BOS, built into its weights by hand.

What is seen in trained models of the Gemma family: every token attends to BOS, whose FFN outputs
are a small part of the others' and are normalised before they are added, so that an absolute error
there is a large one. Random otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import BOS, byte_tokenizer
from tiny_models import tiny_model
from tokenizers.processors import TemplateProcessing

HIDDEN, NEURONS, HEAD = 64, 128, 8
BOS_ID = 256


def save_sink_model(folder: Path) -> Path:
    """Write the model and a tokenizer that puts BOS before every text."""
    model: Any = tiny_model(
        "gemma3_text",
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=4,
        layer_types=["full_attention"] * 4,
        max_position_embeddings=512,
    )
    with torch.no_grad():
        sink_D, common_D = torch.linalg.qr(
            torch.randn(HIDDEN, 2, generator=torch.Generator().manual_seed(7))
        ).Q.T
        embeddings_VD = model.get_input_embeddings().weight
        embeddings_VD += 0.5 * common_D
        embeddings_VD[BOS_ID] = 3 * sink_D + 0.5 * common_D
        for layer in model.model.layers:
            attention = layer.self_attn
            # The lowest frequency of the rotary embedding: the same at every distance.
            for projection, direction_D in (
                (attention.q_proj, common_D),
                (attention.k_proj, sink_D),
            ):
                rows_hD = projection.weight.view(-1, HEAD, HIDDEN)[:, HEAD // 2 - 1]
                rows_hD += 2 * direction_D
            attention.q_norm.weight.fill_(1.0)
            attention.k_norm.weight.fill_(1.0)
            # Strongly negative gates at BOS: gelu leaves next to nothing.
            layer.mlp.gate_proj.weight -= 0.4 * sink_D
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.save_pretrained(folder)
    return folder
