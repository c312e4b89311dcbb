"""The Python interface, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import run_stages, run_values
from transformers import AutoModelForCausalLM

import weaver
from weaver.config.loading import RunConfig, parse_config
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.report.tables import format_number
from weaver.rundir.lock import locked

IDS_1T = torch.arange(40)[None]


def sections(model: Path, **more: Any) -> dict[str, Any]:
    """Small values for the stages that ``convert`` runs."""
    values = run_values(model, **more)
    return {name: values[name] for name in ("calibrate", "partition", "assemble")}


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> weaver.Run:
    return weaver.convert(
        tiny_llama, tmp_path / "run", method="cmoe", sections=sections(tiny_llama), progress=False
    )


def test_a_conversion_is_that_of_a_run_file(
    run: weaver.Run, tiny_llama: Path, tmp_path: Path
) -> None:
    config = parse_config(RunConfig, run_values(tiny_llama), source="test")
    run_stages(config, tmp_path / "file", until="assemble")
    models = [weaver.load(folder)[0] for folder in (run.path, tmp_path / "file")]
    with torch.no_grad():
        ours, theirs = (model(IDS_1T).logits for model in models)
    assert torch.equal(ours, theirs)


def test_what_is_finished_is_skipped(
    run: weaver.Run, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    again = weaver.convert(
        tiny_llama, run.path, method="cmoe", sections=sections(tiny_llama), progress=False
    )
    assert again == run
    for path, time in written.items():
        if path.name != ".lock":
            assert path.stat().st_mtime_ns == time, path
    with pytest.raises(WeaverError, match=r"sparsity: 0.25 on disk, 0.5 asked for"):
        weaver.convert(
            tiny_llama,
            run.path,
            sparsity=0.5,
            method="cmoe",
            sections=sections(tiny_llama),
            progress=False,
        )


def test_sections_hold_where_nothing_else_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    """The arguments of ``convert`` have no defaults that would overrule a section."""
    values = sections(tiny_llama, partition={"sparsity": 0.5})
    run = weaver.convert(
        tiny_llama, str(tmp_path / "run"), dtype="bfloat16", sections=values, progress=False
    )
    recipe = weaver.load(run)[0].config.weaver["recipe"]
    assert recipe["partition"]["sparsity"] == 0.5
    assert recipe["partition"]["method"] == "cmoe"
    assert recipe["model"]["dtype"] == "bfloat16"


def test_what_is_forced_is_one_call(run: weaver.Run, tiny_llama: Path) -> None:
    model = run.path / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    values = sections(tiny_llama)
    again = weaver.convert(tiny_llama, run.path, sections=values, progress=False, force=True)
    assert model.stat().st_mtime_ns > before
    assert not again.force


def test_the_stages_one_by_one(tiny_llama: Path, tmp_path: Path) -> None:
    values = sections(tiny_llama)
    run = weaver.Run(str(tmp_path / "run"), progress=False)  # type: ignore[arg-type]
    assert run.calibrate(tiny_llama, **values["calibrate"]).tokens == 512
    dense = ModelConfig(path=str(tiny_llama), dtype="float32")
    with pytest.raises(WeaverError, match="calibrate: made "):
        run.calibrate(dense, **{**values["calibrate"], "tokens": 256})
    assert run.partition(**values["partition"]).method == "cmoe"
    assert run.build_router(kind="mean-gate").router == "mean-gate"
    run.assemble(**values["assemble"])
    model, tokenizer = weaver.load(run, dtype="float32")
    assert type(model).__name__ == "WeaverLlamaForCausalLM"
    assert tokenizer("a")["input_ids"]


def test_measurements_are_those_on_disk(run: weaver.Run) -> None:
    with pytest.raises(WeaverError, match="the stage has not run"):
        run.report()
    quality = run.evaluate(sequence_length=64, windows=2)
    written = json.loads((run.path / "eval" / "results.json").read_text())
    assert quality.kl == written["kl"] > 0
    assert quality.moe.perplexity == written["moe"]["perplexity"]
    speed = run.bench(tokens=[1], decode_tokens=0, repeats=1, warmup=0)
    assert [row.tokens for row in speed.rows] == [1]
    rows = [line.split("|")[1:-1] for line in run.report().splitlines()[2:]]
    cells = {row[0].strip(): row[2].strip() for row in rows if row}
    assert cells["KL to dense, nats/token"] == format_number(quality.kl)
    assert cells["perplexity"] == format_number(quality.moe.perplexity)
    rate = format_number(speed.rows[0].moe_tokens_per_second)
    assert cells["prefill tokens/s (1 tokens)"].startswith(rate)
    folder = run.export("weaver", run.path / "own")
    assert (folder / "config.json").exists()
    trained = run.finetune(steps=1, batch_size=1, sequence_length=32, eval_windows=1)
    assert len(trained.losses) == 1


def test_options_and_directories_are_checked(run: weaver.Run) -> None:
    with pytest.raises(WeaverError, match="windowz"):
        run.evaluate(windowz=3)
    with locked(run.path), pytest.raises(WeaverError, match="another weaver process"):
        run.evaluate(windows=1)
    with pytest.raises(WeaverError, match="neither a model nor a run directory"):
        weaver.load(run.path / "partition")


def test_importing_is_quick_and_changes_nothing(run: weaver.Run) -> None:
    """Neither torch nor transformers is imported before a name is used."""
    script = (
        "import sys, weaver\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert set(weaver.__all__) <= set(dir(weaver))\n"
        "from weaver import register\n"
        "assert 'transformers' in sys.modules\n"
        "from transformers import AutoConfig\n"
        "register()\n"
        f"print(AutoConfig.from_pretrained({str(run.path / 'model')!r}).model_type)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "weaver_llama"
    with pytest.raises(AttributeError, match="konvert"):
        weaver.konvert  # noqa: B018
    model: Any = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert type(model).__name__ == "WeaverLlamaForCausalLM"
