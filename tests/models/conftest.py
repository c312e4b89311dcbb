"""Tiny checkpoints on disk, one folder per variant and test session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_conversions import OpenTiny
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerFast

from weaver.config.sections import ModelConfig
from weaver.models.checkpoint import Checkpoint


@pytest.fixture
def open_tiny(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> OpenTiny:
    """Write a tiny model into ``tmp_path / variant`` and open it as a checkpoint."""

    def build(variant: str, **options: Any) -> Checkpoint:
        folder = tmp_path / variant
        save_tiny_model(variant, folder, tiny_tokenizer, **options)
        return Checkpoint(ModelConfig(path=str(folder)))

    return build
