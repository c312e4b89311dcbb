"""The whole chain on SmolLM2-135M, with bounds that fail when a method breaks.

``make test`` fetches the model. The bounds leave room for the small calibration (4,096 tokens), but
none for a broken method: at 25% sparsity a random split with a random router measures a KL above 2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import weaver
from weaver.config.sections import (
    AssembleConfig,
    CalibrateConfig,
    EvalConfig,
    ModelConfig,
    PartitionConfig,
    RouterConfig,
)
from weaver.rundir.stage_run import StageContext
from weaver.stages.assemble import assemble
from weaver.stages.build_router import build_routers
from weaver.stages.calibrate import calibrate
from weaver.stages.evaluate import evaluate
from weaver.stages.partition import partition

MODEL = Path(__file__).parents[1] / "models" / "smollm2-135m"

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One calibration for all methods."""
    context = StageContext(tmp_path_factory.mktemp("real"))
    calibrate(
        context,
        # Processors without 16-bit products take several times as long in the checkpoint's dtype.
        ModelConfig(path=str(MODEL), dtype="float32"),
        # A backward pass costs three forward ones, and fewer tokens keep the bounds of weave.
        CalibrateConfig(
            tokens=4096, sequence_length=512, input_sample_mb=8, sensitivity_tokens=1024
        ),
    )
    return context.folder("calibrate")


def convert(run_dir: Path, calibration: Path, **settings: Any) -> dict[str, Any]:
    """Split, assemble and evaluate; the results."""
    context = StageContext(run_dir)
    router = settings.pop("router", None)
    routes = RouterConfig(kind=router)
    partition(context, PartitionConfig(sparsity=0.25, **settings), routes, calibration)
    build_routers(context, routes)
    assemble(context, AssembleConfig(dtype="float32", smoke_test=False))
    evaluate(context, EvalConfig(sequence_length=512, windows=4, dtype="float32"))
    results: dict[str, Any] = json.loads((run_dir / "eval" / "results.json").read_text())
    return results


def test_methods_keep_their_quality_and_their_order(tmp_path: Path, calibration: Path) -> None:
    flap = convert(tmp_path / "flap", calibration, method="flap")
    weave = convert(tmp_path / "weave", calibration, method="weave")
    routed = convert(tmp_path / "ew", calibration, method="expertweaver")
    chance = convert(tmp_path / "random", calibration, method="random", router="random")
    assert 8 < flap["dense"]["perplexity"] < 30
    assert flap["kl"] < 0.6
    assert routed["kl"] < 1.1
    assert flap["kl"] < routed["kl"] < chance["kl"]
    assert weave["kl"] < 0.5 * flap["kl"]
    # What a text uses is what was asked for, and its first tokens are no worse than the others.
    asked = weave["moe"]["ffn_flops_per_token"]
    assert weave["measured_ffn_flops_per_token"] == pytest.approx(asked, rel=0.02)
    by_position = {part["first"]: part["kl"] for part in weave["kl_by_position"]}
    assert by_position[1] < by_position[129]
    assert by_position[2] < 1.5 * by_position[129]
    for results in (weave, flap, routed, chance):
        assert results["ffn_sparsity"] == pytest.approx(0.25, abs=0.002)


def test_the_converted_model_speaks(tmp_path: Path, calibration: Path) -> None:
    context = StageContext(tmp_path)
    config = PartitionConfig(method="flap", sparsity=0.125)
    partition(context, config, RouterConfig(), calibration)
    build_routers(context, RouterConfig())
    assemble(context, AssembleConfig())
    folder = context.folder("assemble")
    loaded: Any = weaver.load(folder, "bfloat16")
    model, tokenizer = loaded
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])
