"""An export in a runtime that lists the likeliest tokens, against the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from weaver.artifacts.dtypes import dtype_name
from weaver.artifacts.verification import Verification
from weaver.config.sections import VerifyConfig
from weaver.evaluation.listed import LISTED, ListedTotals
from weaver.evaluation.logits import chunked_logits
from weaver.export import llamacpp
from weaver.export.registry import OWN
from weaver.export.vllm_runtime import run_in_vllm
from weaver.rundir.stage_run import StageContext

# Prompts that both models continue, and their length in tokens.
PROMPTS, PROMPT_TOKENS = 2, 16


def prompts_of(windows_WT: Tensor) -> Tensor:
    """The prompts that both models continue: beginnings of windows, (P, T)."""
    return windows_WT[:PROMPTS, :PROMPT_TOKENS]


@torch.no_grad()
def same_text(
    native: PreTrainedModel, prompts_PT: Tensor, texts: list[list[int]], count: int
) -> float:
    """Share of new tokens before the first one that differs, over all prompts."""
    same = total = 0
    for prompt_T, text in zip(prompts_PT, texts, strict=True):
        output: Any = native.generate(prompt_T[None], max_new_tokens=count, do_sample=False)  # type: ignore[operator]
        expected = output[0].tolist()[prompt_T.numel() :]
        found = text[prompt_T.numel() :]
        differs = [a != b for a, b in zip(expected, found, strict=False)]
        same += differs.index(True) if True in differs else len(differs)
        total += len(expected)
    return same / max(total, 1)


def verify_gguf(
    context: StageContext,
    export: Path,
    native: PreTrainedModel,
    windows_WT: Tensor,
    config: VerifyConfig,
) -> Verification:
    """Log-probabilities behind every prefix of the windows, by llama.cpp and by the model."""
    (file,) = sorted(export.glob("*.gguf"))
    totals = ListedTotals()
    with context.progress("verify", windows_WT.shape[0]) as advance:
        for index, window_T in enumerate(windows_WT):
            prefixes = [window_T[:end].tolist() for end in range(1, window_T.numel())]
            found = llamacpp.top_logprobs(file, prefixes, LISTED)
            totals.add(_log_probabilities(native, window_T), found)
            advance(f"window {index + 1}")
    prompts_PT = prompts_of(windows_WT)
    texts = [
        [*prompt, *llamacpp.greedy(file, prompt, config.new_tokens)]
        for prompt in prompts_PT.tolist()
    ]
    same = same_text(native, prompts_PT, texts, config.new_tokens)
    return _listed("gguf", "llama.cpp", file.stem.removeprefix("model-"), totals, same)


def verify_in_vllm(
    export: Path,
    target: str,
    native: PreTrainedModel,
    windows_WT: Tensor,
    config: VerifyConfig,
) -> Verification:
    """The same by vLLM: with weaver's plug-in for weaver's own type, else without any plug-in."""
    prompts_PT = prompts_of(windows_WT)
    dtype = dtype_name(native.dtype)
    answers = run_in_vllm(
        export,
        windows_WT.tolist(),
        prompts_PT.tolist(),
        new_tokens=config.new_tokens,
        top=LISTED,
        plugin=target == OWN,
        engine={"dtype": dtype},
    )
    totals = ListedTotals()
    for window_T, found in zip(windows_WT, answers.logprobs, strict=True):
        totals.add(_log_probabilities(native, window_T), found)
    pairs = zip(prompts_PT.tolist(), answers.texts, strict=True)
    texts = [[*prompt, *text] for prompt, text in pairs]
    same = same_text(native, prompts_PT, texts, config.new_tokens)
    return _listed(target, f"vLLM {answers.version}", dtype, totals, same)


def _log_probabilities(native: PreTrainedModel, window_T: Tensor) -> Tensor:
    """Of the tokens behind every prefix of a window, float64, (T - 1, V)."""
    return torch.cat(list(chunked_logits(native, window_T))).double().log_softmax(-1)[:-1]


def _listed(
    target: str, name: str, dtype: str, totals: ListedTotals, same_text: float
) -> Verification:
    return Verification(
        target=target,
        loaded_as=name,
        dtype=dtype,
        tokens=totals.positions,
        kl=totals.mean_kl,
        top1_agreement=totals.top1_agreement,
        same_text=same_text,
        max_logprob_difference=max(totals.differences),
        mean_logprob_difference=totals.mean_difference,
    )
