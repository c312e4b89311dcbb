"""Converted models of every family in vLLM itself, where it is installed, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from exports import conversions_of
from tiny_conversions import load_converted, random_compensation, write_converted
from tiny_models import random_ids, save_tiny_model

from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.evaluation.listed import ListedTotals
from weaver.export.remote_code import add_remote_code
from weaver.export.vllm_runtime import run_in_vllm
from weaver.models.checkpoint import Checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed")

# Kernels of vLLM's attention on a CPU want heads of 32 at least.
SIZES: dict[str, Any] = {"hidden_size": 128}
HEADS: dict[str, Any] = {**SIZES, "head_dim": 32}
GEMMA: dict[str, Any] = {**HEADS, "query_pre_attn_scalar": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": SIZES,
    "olmo2": SIZES,
}
# Chunks of a prompt of 40 tokens, and several sequences in a step.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 64}
NEW = 8
REFUSED = ("gemma2", "olmo2")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def converted(folder: Path, variant: str) -> Path:
    """A model with thresholds that move along a sequence, constants and uneven splits."""
    save_tiny_model(variant, folder / "dense", byte_tokenizer(), **VARIANTS[variant])
    checkpoint = Checkpoint(ModelConfig(path=str(folder / "dense")))
    splits = ((8, 5, 8, 2), (14, 3, 9, 1), (8, 5, 8, 3))
    moved: dict[str, Any] = {"threshold_slope": 0.5, "early_experts": 3.0, "late_experts": 2.0}
    conversions = [
        (layout, None if router is None else replace(router, **moved))
        for layout, router in conversions_of(
            checkpoint, splits, intercept=True, selection="threshold"
        )
    ]
    compensations = [
        random_compensation(
            checkpoint.intermediate_size, checkpoint.hidden_size, splits[layer][1], seed=layer
        )
        for layer in range(len(splits))
    ]
    return write_converted(checkpoint, folder / "own", conversions, compensations=compensations)


def check(folder: Path, **engine: Any) -> None:
    """Log-probabilities and texts are those of transformers with weaver's type."""
    native, ids = load_converted(folder), random_ids(3, 40)
    prompts = ids[:, :5]
    answers = run_in_vllm(
        folder,
        ids.tolist(),
        prompts.tolist(),
        new_tokens=NEW,
        top=50,
        plugin=True,
        engine={**ENGINE, **engine},
    )
    totals = ListedTotals()
    with torch.no_grad():
        for ids_T, listed in zip(ids, answers.logprobs, strict=True):
            totals.add(native(ids_T[None]).logits[0, :-1].log_softmax(-1), listed)
        for prompt_T, text in zip(prompts, answers.texts, strict=True):
            native.generation_config.eos_token_id = None
            written: Any = native.generate(prompt_T[None], max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
            assert written[0].tolist()[5:] == text
    assert max(totals.differences) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in REFUSED])
def test_a_family_computes_what_transformers_computes(variant: str, tmp_path: Path) -> None:
    check(converted(tmp_path, variant))


@pytest.mark.slow
def test_two_ranks_share_the_neurons(tmp_path: Path) -> None:
    check(converted(tmp_path, "llama"), tensor_parallel_size=2)


@pytest.mark.slow
def test_graphs_take_the_ffn_whole(tmp_path: Path) -> None:
    check(converted(tmp_path, "llama"), enforce_eager=False)


@pytest.mark.slow
def test_the_transformers_backend_runs_remote_code_beside_the_plug_in(tmp_path: Path) -> None:
    folder, ids = converted(tmp_path, "llama"), random_ids(2, 20).tolist()
    add_remote_code(folder)
    engine = {**ENGINE, "model_impl": "transformers", "trust_remote_code": True}
    beside, alone = (
        run_in_vllm(folder, ids, ids, new_tokens=NEW, top=50, plugin=plugin, engine=engine)
        for plugin in (True, False)
    )
    assert beside.texts == alone.texts
    for one, other in zip(beside.logprobs, alone.logprobs, strict=True):
        for mine, listed in zip(one, other, strict=True):
            likeliest = max(mine, key=lambda token: mine[token])
            assert mine[likeliest] == pytest.approx(listed[likeliest], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "engine", "message"),
    [
        *((name, {}, f"converted {name} does not run in vLLM") for name in REFUSED),
        ("llama", {"pipeline_parallel_size": 2}, "have no pipeline parallelism"),
    ],
)
def test_what_vllm_lacks_is_said(
    variant: str, engine: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = converted(tmp_path, variant)
    with pytest.raises(WeaverError) as caught:
        run_in_vllm(
            folder, [[1, 2, 3]], [[1]], new_tokens=1, top=5, plugin=True, engine=ENGINE | engine
        )
    assert message in caught.value.why
