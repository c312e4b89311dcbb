"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerFast

# Messages are compared word by word; a narrow terminal would break them inside table cells. Set
# before weaver's console is made, and inherited by the processes that tests start.
os.environ["COLUMNS"] = "250"
# The compiled kernel and the measured costs stay in the clone, for the next run of the tests.
os.environ["WEAVER_CACHE"] = str(Path(__file__).parents[1] / ".cache")


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, with the byte as its id; bos 256, eos 257, pad 258."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of four layers with 64 neurons each; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_tiny_model(
        "llama",
        folder,
        byte_tokenizer(),
        num_hidden_layers=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    return folder
