"""Fixtures that several packages' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerFast

from weaver.kernels.costs import TOKENS, Costs, LayerKind
from weaver.models import forecast

# Messages are compared word by word; a narrow terminal would break them inside table cells. Set
# before weaver's console is made, and inherited by the processes that tests start.
os.environ["COLUMNS"] = "250"
# The compiled kernel and the measured costs stay in the clone, for the next run of the tests.
os.environ["WEAVER_CACHE"] = str(Path(__file__).parents[1] / ".cache")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end one worker would be alone with them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.name != "test_real_model.py"))


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


@pytest.fixture
def made_up_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed-ups are predicted from made-up times, as if routing always took more than is saved.

    Every way to compute an FFN takes a second, and its router a tenth of one per expert: times that
    are measured differ from machine to machine and from minute to minute.
    """

    def costs_of(family: LayerKind) -> Costs:
        second = (1.0,) * len(TOKENS)
        routing = (0.1 * (family.neurons // family.width),) * len(TOKENS)
        return Costs(dense=second, masked=second, expert=second, routing=routing)

    monkeypatch.setattr(forecast, "costs_of", costs_of)
