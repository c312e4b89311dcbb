"""Conversations as text: rows of ``messages`` through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from weaver.data.sources import Document, read_documents
from weaver.errors import WeaverError


def read_texts(
    location: str, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None
) -> list[Document]:
    """Read the documents of a location, conversations as the model is shown them.

    A bos token that the template writes is left out where the tokenizer puts one before text
    anyway.

    Args:
        location, data_dir: see ``read_documents``.
        tokenizer: has the chat template.

    Raises:
        WeaverError: as ``read_documents``; or there are conversations, and no template for them.
    """
    documents = read_documents(location, data_dir)
    if any(document.messages for document in documents) and not tokenizer.chat_template:
        raise WeaverError(
            f"{location}: has rows of messages, and the tokenizer no chat template",
            why="a conversation becomes text through the template that the model was trained with",
            fix="use text rows, or a model whose tokenizer has a chat template",
        )
    return [_rendered(document, tokenizer, location) for document in documents]


def _rendered(document: Document, tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    if not document.messages:
        return document
    messages: Sequence[Mapping[str, Any]] = document.messages
    try:
        text = tokenizer.apply_chat_template([dict(each) for each in messages], tokenize=False)
    # Templates are programs of the model's authors, which raise whatever they like.
    except Exception as error:
        raise WeaverError(
            f"{where}: the chat template refuses a conversation",
            why=f"{type(error).__name__}: {error}",
            fix="mend or leave out such rows; some templates want user and assistant in turn",
        ) from error
    return replace(document, text=str(text).removeprefix(str(tokenizer.bos_token or "")))
