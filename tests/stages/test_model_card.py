"""The model card of a run: the base model's licence, and what eval measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tiny_runs import read_results, run_config, run_stages

from weaver.config.sections import EvalConfig, ExportConfig
from weaver.rundir.stage_folders import finished_stage
from weaver.rundir.stage_run import StageContext
from weaver.stages.evaluate import evaluate
from weaver.stages.export import export, plan_export
from weaver.stages.model_card import base_license


@pytest.mark.parametrize(
    ("card", "config", "licence"),
    [
        ("---\nlicense: mit\n---\n# A model", {"license": "other"}, "mit"),
        ("# A model\n---\nlicense: mit\n---\n", {"license": "other"}, "other"),
        ("---\nlicense: [\n---\n", {}, None),
        ("---\n- license\n---\n", {"license": 3}, None),
        (None, {}, None),
    ],
)
def test_the_licence_of_a_base_model(
    tmp_path: Path, card: str | None, config: dict[str, object], licence: str | None
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert base_license(tmp_path) == licence


def test_eval_completes_the_card(tiny_llama: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_stages(run_config(tiny_llama, router={"kind": "mean-gate"}), run_dir, until="assemble")
    card = run_dir / "model" / "README.md"
    assert "## Results" not in card.read_text()
    before = finished_stage(run_dir / "model", "assemble")[1].digest
    task = tmp_path / "quiz.jsonl"
    item = {"query": "One, two,", "choices": ["three", "a whale"], "gold": 0}
    task.write_text("\n".join([json.dumps(item)] * 2))
    config = EvalConfig(sequence_length=64, windows=2, tasks=(str(task),))

    evaluate(StageContext(run_dir), config)

    assert finished_stage(run_dir / "model", "assemble")[1].digest == before
    rows = dict(re.findall(r"^\| (\S.*?) +\| +(\S.*?) +\|$", card.read_text(), flags=re.MULTILINE))
    results = read_results(run_dir)
    assert float(rows["KL(dense, converted), nats per token"]) == pytest.approx(
        results["kl"], rel=0.01, abs=1e-4
    )
    assert rows["text"] == "builtin:held-out, 126 predicted tokens in windows of 64"
    assert re.fullmatch(
        r"[\d.]+% ± [\d.]+% \(dense [\d.]+% ± [\d.]+%\)", rows["quiz, acc_norm (n=2)"]
    )

    complete = card.read_text()
    card.write_text("lost")
    evaluate(StageContext(run_dir), config)
    assert card.read_text() == complete

    plan = plan_export(StageContext(run_dir), ExportConfig(), tmp_path / "out")
    export(StageContext(run_dir), plan)
    assert "## Results" in (tmp_path / "out" / "README.md").read_text()
