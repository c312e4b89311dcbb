"""Rows of messages become the text that the model's chat template makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from weaver.data.chat import read_texts
from weaver.data.packing import read_windows
from weaver.errors import WeaverError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


@pytest.fixture
def tokenizer(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tiny_tokenizer.chat_template = TEMPLATE
    return tiny_tokenizer


def test_conversations_and_texts_in_one_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    location = rows(tmp_path / "a.jsonl", {"messages": TALK, "task": "chat"}, {"text": "plain"})
    found = read_texts(location, tokenizer, None)
    assert [(each.text, each.group) for each in found] == [
        ("[user]Hi[assistant]Hello", "chat"),
        ("plain", "a"),
    ]


def test_windows_are_of_the_rendered_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    location = rows(tmp_path / "a.jsonl", {"messages": TALK})
    ids_WT = read_windows([location], tokenizer, sequence_length=8, limit=None)
    assert bytes(ids_WT.flatten().tolist()) == b"[user]Hi[assistant]Hello"


def test_no_template(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    location = rows(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(WeaverError, match="has rows of messages, and the tokenizer no chat"):
        read_texts(location, tiny_tokenizer, None)


def test_a_conversation_that_the_template_refuses(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    location = rows(tmp_path / "a.jsonl", {"messages": [{"role": "tool", "content": "4"}]})
    with pytest.raises(WeaverError, match="the chat template refuses a conversation") as caught:
        read_texts(location, tokenizer, None)
    assert "no tools" in caught.value.why


@pytest.mark.parametrize("messages", ["Hi", [], ["Hi"], [{"role": "user"}]])
def test_messages_of_another_form(
    messages: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    location = rows(tmp_path / "a.jsonl", {"messages": messages})
    with pytest.raises(WeaverError, match="has no text; its keys are messages"):
        read_texts(location, tokenizer, None)
