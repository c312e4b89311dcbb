"""Log-probabilities and greedy tokens that llama.cpp computes with a GGUF file.

Through the package ``xllamacpp``, llama.cpp with Python bindings; only checks need it, not the
export. Attention and its cache stay float32, so that differences come from the weights and the
kernels for their types; llama.cpp's own default keeps the cache in float16.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weaver.errors import WeaverError, require_extra

# llama.cpp reports no probabilities for a token that ends inside a UTF-8 character. They are those
# before sampling, so what is sampled then is held to ASCII; or to nothing, the end of the text.
_ASCII = "root ::= [ -~]*"
# llama.cpp also listens on a port of this machine; nobody else gets to know the key.
_KEY = secrets.token_hex()


def top_logprobs(
    gguf: Path, prompts: Sequence[Sequence[int]], count: int
) -> list[dict[int, float]]:
    """The likeliest next tokens after each prompt.

    Prompts with a common beginning are faster next to each other: what the previous one has in
    common with the next is not computed again.

    Args:
        gguf: a GGUF file.
        prompts: token ids, at least one each; none is added.
        count: how many tokens to return.

    Returns:
        For each prompt the natural logarithm of the probability by token, the likeliest first.

    Raises:
        WeaverError: xllamacpp is missing, or llama.cpp cannot load or run the file.
    """
    server = _server(gguf, max(len(prompt) for prompt in prompts))
    return [_next_token(server, gguf, prompt, count) for prompt in prompts]


def greedy(gguf: Path, prompt_ids: Sequence[int], tokens: int) -> list[int]:
    """The likeliest token, again and again; an end of text does not end it.

    Args:
        gguf: a GGUF file.
        prompt_ids: token ids, at least one; none is added.
        tokens: how many tokens to return.

    Raises:
        WeaverError: xllamacpp is missing, or llama.cpp cannot load or run the file.
    """
    server = _server(gguf, len(prompt_ids) + tokens)
    ids = list(prompt_ids)
    for _ in range(tokens):
        ids.append(next(iter(_next_token(server, gguf, ids, 1))))
    return ids[len(prompt_ids) :]


def tokenise(gguf: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts by the tokenizer in the file, without special tokens at the ends.

    Args:
        gguf: a GGUF file.
        texts: what to tokenise; the text of a special token becomes that token.

    Raises:
        WeaverError: xllamacpp is missing, or llama.cpp cannot load the file.
    """
    server = _server(gguf, 1)
    # The bindings have no function for it, but the server that they start does.
    host = server.listening_address.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    headers = {"Authorization": f"Bearer {_KEY}"}
    # A server that goes before its loop began waits for it forever, and /tokenize needs no loop.
    connection.request("GET", "/slots", headers=headers)
    connection.getresponse().read()
    ids: list[list[int]] = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": True})
        connection.request("POST", "/tokenize", body, headers)
        ids.append(json.loads(connection.getresponse().read())["tokens"])
    connection.close()
    return ids


def _server(gguf: Path, tokens: int) -> Any:
    """llama.cpp with one file, for texts of up to a number of tokens."""
    require_extra("xllamacpp", "gguf", f"a check of {gguf}")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx = tokens + 1
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_ram_mib = 0
    # Sizes are set above, there is nothing to adapt to the memory at hand.
    params.fit_params = params.warmup = params.ui = False
    params.verbosity = -1
    params.api_keys = [_KEY]
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        raise WeaverError(
            f"{gguf}: llama.cpp cannot load it",
            why=str(error),
            fix="export the model again; if that does not help, pip install -U xllamacpp",
        ) from error


def _next_token(server: Any, gguf: Path, prompt: Sequence[int], count: int) -> dict[int, float]:
    request = {
        "prompt": list(prompt),
        "max_tokens": 1,
        "n_probs": count,
        "grammar": _ASCII,
        "cache_prompt": True,
    }
    answer = server.handle_completions(request)
    if "error" in answer:
        raise WeaverError(
            f"{gguf}: llama.cpp cannot run {len(prompt)} tokens",
            why=answer["error"]["message"],
            fix="give at least one token of the model's vocabulary, and no more than its context",
        )
    first = answer["choices"][0]["logprobs"]["content"][0]
    return {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
