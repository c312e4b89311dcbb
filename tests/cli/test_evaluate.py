"""``weaver eval`` as a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_runs import file_times, read_results, run_config, run_stages, run_values, write_config
from typer.testing import CliRunner, Result

import weaver.cli.app
from weaver.artifacts.results import EvalResult
from weaver.artifacts.types import FIRST_TOKENS
from weaver.evaluation.tasks import run_task
from weaver.report.comparison import score_cells, task_scores


@pytest.fixture
def assembled(tiny_llama: Path, tmp_path: Path) -> Path:
    run_stages(run_config(tiny_llama), tmp_path / "run", until="assemble")
    return tmp_path / "run"


def evaluate(run_dir: Path, *flags: str | Path) -> Result:
    words = ["eval", "--run-dir", run_dir, "--sequence-length", "64", "--windows", "2", *flags]
    return CliRunner().invoke(weaver.cli.app.app, [str(word) for word in words])


def test_the_router_flag_shows_and_writes_the_report(assembled: Path) -> None:
    result = evaluate(assembled, "--router")

    assert result.exit_code == 0, result.output
    report = read_results(assembled)["router"]
    assert report["tokens"] == 2 * (64 - FIRST_TOKENS)
    assert "router on 124 held-out tokens; cmoe on halves of" in result.output
    for header in ("oracle agreement", "captured contribution", "expert Jaccard"):
        assert header in result.output
    mean = next(line for line in result.output.splitlines() if " mean " in line)
    assert f"{100 * report['mean']['oracle_agreement']:.1f}%" in mean
    refused = evaluate(assembled)
    assert refused.exit_code == 1
    assert "router: " in refused.stderr


def test_the_flag_overrides_the_file(assembled: Path, tiny_llama: Path, tmp_path: Path) -> None:
    values = run_values(tiny_llama, eval={"router": True})
    path = write_config(tmp_path / "config.yaml", values)

    assert evaluate(assembled, "--config", path, "--no-router").exit_code == 0

    assert read_results(assembled)["router"] is None


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    rows = [
        {"query": f"{i} is", "choices": ["one", "a whale", "3"], "gold": i % 3} for i in range(12)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_scores_are_printed_with_their_errors_and_counts(assembled: Path, quiz: Path) -> None:
    result = evaluate(assembled, "--task", quiz)

    assert result.exit_code == 0, result.output
    found = EvalResult.model_validate(read_results(assembled))
    (score,) = task_scores(found.dense.tasks, found.moe.tasks)
    assert (score.items, score.metric) == (12, "acc_norm")
    pairs = zip(
        *(each.tasks[str(quiz)].correct["acc_norm"] for each in (found.dense, found.moe)),
        strict=True,
    )
    differences = [b - a for a, b in pairs]
    mean = sum(differences) / 12
    error = (sum((each - mean) ** 2 for each in differences) / 11 / 12) ** 0.5
    assert score.difference_error == pytest.approx(error)
    assert "quiz, acc_norm (n=12)" in result.output
    for cell in score_cells(score):
        assert cell in result.output
    # The count is that of the file, not of --task-limit.
    assert result.stderr.count("12/12 done") == 2


def test_tasks_that_cannot_be_opened_leave_results_alone(
    assembled: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(assembled).exit_code == 0
    before = file_times(assembled)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    damaged = quiz.with_name("damaged.jsonl")
    damaged.write_text(quiz.read_text() + "\n{")
    for task in ("harness:arc_easy", damaged):
        result = evaluate(assembled, "--task", task, "--force")
        assert result.exit_code == 1
        assert "fix:" in result.stderr
    assert file_times(assembled) == before


def test_an_interrupted_task_goes_on_with_the_next_item(
    assembled: Path, quiz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(assembled, "--task", quiz).exit_code == 0
    expected = read_results(assembled)
    taken_over: list[int] = []

    def stops(model, tokenizer, task, *, done, on_item):  # type: ignore[no-untyped-def]
        taken_over.append(len(done))
        left = iter(range(5 if len(taken_over) == 2 else 99))

        def keep(scores):  # type: ignore[no-untyped-def]
            if next(left, None) is None:
                raise KeyboardInterrupt
            on_item(scores)

        return run_task(model, tokenizer, task, done=done, on_item=keep)

    monkeypatch.setattr("weaver.stages.eval_tasks.run_task", stops)
    assert evaluate(assembled, "--task", quiz, "--force").exit_code == 130
    assert evaluate(assembled, "--task", quiz, "--force").exit_code == 0
    assert taken_over == [0, 0, 12, 5]
    assert read_results(assembled) == expected
