"""Text that a model writes by itself, and how much of it repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from weaver.errors import WeaverError

# Length of the pieces whose repetition is counted: short words and names come again in any text,
# four tokens in a row hardly do.
NGRAM = 4


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Args:
        max_new_tokens: N, tokens at most; fewer where the model ends its text.
        temperature: what logits are divided by before a token is drawn; 0 takes the most probable.
        top_p: draw from the smallest set of tokens that has this share of the probability.
        seed: root of what is drawn; equal seeds give equal text.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 <= self.top_p <= 1:
            raise ValueError(f"cannot decode by {self}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0


class CallbackStreamer(TextStreamer):
    """transformers' streamer, which hands finished text to a function instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        """Hand text on; at the end of the stream it may be empty."""
        self._on_text(text)


def generate_ids(
    model: PreTrainedModel,
    ids_BT: Tensor,
    decoding: Decoding,
    *,
    streamer: TextStreamer | None = None,
    ends: bool = True,
) -> Tensor:
    """Continue prompts of equal length with transformers' ``generate`` and return the new tokens.

    Of the model's ``generation_config.json`` only the special tokens count: a repetition penalty or
    a top-k in it would hide what the model itself does, and differ between models.

    Args:
        model: a causal LM.
        ids_BT: the prompts, int64, (B, T).
        decoding: how tokens are chosen.
        streamer: gets every token as it comes; with B = 1 only.
        ends: whether the model's end-of-text tokens end the text; else it has N tokens.

    Returns:
        The new tokens, int64, (B, at most N); a text that ended before the others is padded.

    Raises:
        WeaverError: logits are not finite, so that no token can be drawn.
    """
    generate: Any = model.generate
    sampling: dict[str, Any] = {"temperature": decoding.temperature, "top_p": decoding.top_p}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(decoding.seed)
        try:
            out_BT: Tensor = generate(
                ids_BT.to(model.device),
                attention_mask=torch.ones_like(ids_BT, device=model.device),
                max_new_tokens=decoding.max_new_tokens,
                min_new_tokens=None if ends else decoding.max_new_tokens,
                do_sample=not decoding.is_greedy,
                **(dict.fromkeys(sampling) if decoding.is_greedy else sampling),
                top_k=0,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                pad_token_id=_pad_token(model),
                streamer=streamer,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise WeaverError(
                f"{model.config.model_type} model: no token can be drawn",
                why=f"logits computed in {model.dtype} are not finite",
                fix="--dtype float32",
            ) from error
    return out_BT[:, ids_BT.shape[1] :]


def repetition(tokens: Sequence[int], size: int = NGRAM) -> float:
    """Share of a text's n-grams that occurred in it before.

    ``1 - |{x_t..x_{t+n-1}}| / (T - n + 1)``, distinct n-grams over all n-grams: 0 if none comes
    again, near 1 for one token for ever; a loop of p tokens from position s on tends to
    ``1 - (s + p) / T``.

    Args:
        tokens: the text without its prompt, T tokens.
        size: n.

    Returns:
        A share in [0, 1); 0 for a text shorter than n.

    Raises:
        ValueError: n is not positive.
    """
    if size < 1:
        raise ValueError(f"n-grams of size {size}")
    ngrams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _pad_token(model: PreTrainedModel) -> int:
    """Any token will do where no prompt is padded; named, so that transformers need not guess."""
    configured = model.generation_config
    ends = configured.eos_token_id if configured is not None else None
    first = ends[0] if isinstance(ends, list) else ends
    return 0 if first is None else int(first)
