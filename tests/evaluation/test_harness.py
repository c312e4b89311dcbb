"""The harness adapter, against a stand-in with lm-eval's interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from weaver.errors import WeaverError
from weaver.evaluation.harness import (
    open_harness,
    read_harness_output,
    run_harness,
    split_tasks,
)

BuildModel = Callable[..., PreTrainedModel]

OUTPUT: dict[str, Any] = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
            "sample_len": 100,
        },
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2},
        "both": {"acc,none": 0.4, "alias": "both"},
    },
    "n-shot": {"arc_easy": 0, "gsm8k": 5},
    "samples": {
        "arc_easy": [
            {"doc_id": 1, "filter": "none", "acc": 0.0, "acc_norm": 1.0},
            {"doc_id": 0, "filter": "none", "acc": 1.0, "acc_norm": 0.0},
        ],
        "gsm8k": [{"doc_id": 0, "filter": "strict-match", "exact_match": 0.0}],
    },
    "n-samples": {
        "arc_easy": {"original": 2376, "effective": 2},
        "gsm8k": {"original": 1319, "effective": 50},
    },
    "group_subtasks": {"both": ["arc_easy", "gsm8k"], "arc_easy": []},
}


class Harness:
    """Records the calls that lm-eval would get."""

    def __init__(self) -> None:
        self.adapter: dict[str, Any] = {}
        self.call: dict[str, Any] = {}
        self.loaded: list[str] = []
        self.include_path: str | None = None
        self.offline = False

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        harness = self

        class HFLM:
            def __init__(self, **kwargs: Any) -> None:
                harness.adapter = kwargs

        class TaskManager:
            def __init__(self, include_path: str | None = None) -> None:
                harness.include_path = include_path

            def match_tasks(self, names: list[str]) -> list[str]:
                return [name for name in names if name in OUTPUT["results"]]

            def load(self, names: list[str]) -> None:
                harness.loaded += names
                if "gsm8k" in names and harness.offline:
                    raise ConnectionError("no route to the hub")

        def simple_evaluate(**kwargs: Any) -> dict[str, Any]:
            harness.call = kwargs
            return OUTPUT

        members: dict[str, dict[str, Any]] = {
            "lm_eval": {"simple_evaluate": simple_evaluate},
            "lm_eval.models": {},
            "lm_eval.models.huggingface": {"HFLM": HFLM},
            "lm_eval.tasks": {"TaskManager": TaskManager},
        }
        for name, values in members.items():
            module = ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("weaver.evaluation.harness._version", lambda: "0.0")


def test_names_are_split_by_their_prefix() -> None:
    names = ("mc/piqa.jsonl", "harness:arc_easy", "harness:gsm8k")
    assert split_tasks(names) == (("mc/piqa.jsonl",), ("arc_easy", "gsm8k"))


def test_without_the_extra_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(
        WeaverError, match=r"harness tasks arc_easy: .* cannot be imported"
    ) as error:
        open_harness(["arc_easy"])
    assert error.value.fix == "pip install 'weaver-moe[eval]'"


def test_model_tokenizer_tasks_and_limit_are_passed_on(
    build_llama: BuildModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    harness = Harness()
    harness.install(monkeypatch)
    model = build_llama()
    tasks = open_harness(("arc_easy", "gsm8k"), include_path=tmp_path, shots=5)
    assert harness.loaded == ["arc_easy", "gsm8k"]
    assert harness.include_path == str(tmp_path)
    output = run_harness(model, tokenizer, tasks, limit=100)
    assert harness.adapter["pretrained"] is model
    assert harness.adapter["tokenizer"] is tokenizer
    assert harness.adapter["backend"] == "causal"
    assert harness.call["tasks"] == ["arc_easy", "gsm8k"]
    assert (harness.call["limit"], harness.call["num_fewshot"]) == (100, 5)
    assert output.scores["harness:arc_easy"].metrics["acc"] == 0.5
    assert output.raw.keys() == OUTPUT.keys()


def test_own_task_files_are_part_of_the_digest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Harness().install(monkeypatch)
    digests = []
    for words in ("one", "two"):
        (tmp_path / "own.yaml").write_text(words)
        digests.append(open_harness(["arc_easy"], include_path=tmp_path).digest)
    assert digests[0] != digests[1]
    with pytest.raises(WeaverError, match="no such folder"):
        open_harness(["arc_easy"], include_path=tmp_path / "nowhere")


def test_unknown_tasks_and_missing_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    harness.install(monkeypatch)
    with pytest.raises(WeaverError, match="harness tasks arc_hard: not known"):
        open_harness(["arc_easy", "arc_hard"])
    harness.offline = True
    with pytest.raises(WeaverError, match=r"harness task gsm8k: .* cannot load it") as error:
        open_harness(["arc_easy", "gsm8k"])
    assert "no route to the hub" in error.value.why


def test_the_results_format_is_read() -> None:
    results = read_harness_output(OUTPUT)
    assert list(results) == ["harness:arc_easy", "harness:gsm8k", "harness:both"]
    arc = results["harness:arc_easy"]
    assert arc.metrics == {"acc": 0.5, "acc_stderr": 0.05, "acc_norm": 0.25}
    assert (arc.kind, arc.items, arc.shots) == ("harness", 2, 0)
    assert arc.correct == {"acc": (1, 0), "acc_norm": (0, 1)}
    # One of fifty samples is there: nothing to pair.
    assert results["harness:gsm8k"].correct == {}
    assert results["harness:gsm8k"].shots == 5
    assert results["harness:gsm8k"].metrics == {
        "exact_match,strict-match": 0.1,
        "exact_match,flexible-extract": 0.2,
    }
    assert results["harness:both"].items == 52
