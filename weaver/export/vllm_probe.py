"""A process that runs a model folder in vLLM: ``weaver verify --runtime vllm`` starts this file.

It imports nothing of weaver; with ``VLLM_PLUGINS`` empty vLLM does not either. One JSON file says
what to compute, another gets the answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer the questions of a file: log-probabilities along windows, and greedy texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    arguments = parser.parse_args()
    asked: dict[str, Any] = json.loads(arguments.questions.read_text())

    import vllm

    windows, prompts = asked["windows"], asked["prompts"]
    longest = max(len(ids) for ids in windows)
    longest = max(longest, *(len(ids) + asked["new_tokens"] for ids in prompts)) + 1
    # Prompts and answers are token ids.
    engine = {"skip_tokenizer_init": True, **asked["engine"]}
    llm = vllm.LLM(max_model_len=longest, max_logprobs=asked["top"], **engine)
    along = vllm.SamplingParams(max_tokens=1, prompt_logprobs=asked["top"], detokenize=False)
    read: Any = llm.generate([{"prompt_token_ids": ids} for ids in windows], along)
    greedy = vllm.SamplingParams(
        temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False
    )
    written: Any = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    # Nothing stands before the first token of a window.
    places = [answer.prompt_logprobs[1:] for answer in read]
    answers = {
        "version": vllm.__version__,
        "logprobs": [
            [{token: each.logprob for token, each in place.items()} for place in window]
            for window in places
        ],
        "texts": [list(answer.outputs[0].token_ids) for answer in written],
    }
    arguments.answers.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
