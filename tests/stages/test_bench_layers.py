"""Single FFNs of a size or of a run: shapes by hand, what is timed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_conversions import ffns_of, load_converted
from tiny_runs import run_config, run_stages
from torch import Tensor, nn

from weaver.artifacts.bench_results import BenchRow, FfnLevel
from weaver.config.sections import BenchConfig, ModelConfig
from weaver.errors import WeaverError
from weaver.evaluation import layers
from weaver.evaluation.layers import LayerCase
from weaver.models.accounting import LayerShape
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.converted_model import open_converted
from weaver.rundir.stage_run import StageContext
from weaver.stages import bench_layers
from weaver.stages.bench import prompt
from weaver.stages.bench_layers import LayerSize, bench_run, bench_size

CONFIG = BenchConfig(tokens=(1, 6), repeats=1, warmup=0)


@pytest.mark.parametrize(
    ("neurons", "slices", "sparsity", "expected"),
    [
        # 6 of 8 slices of 8 are active, 2 of them shared: 4 of the 6 others.
        (64, 8, 0.25, LayerShape(16, 6, 8, 4, "linear")),
        # 4 are active, 1 of them shared: 3 of 7.
        (64, 8, 0.5, LayerShape(8, 7, 8, 3, "linear")),
        # One active slice must be left to choose.
        (64, 8, 0.875, LayerShape(0, 8, 8, 1, "linear")),
        (64, 2, 0.5, LayerShape(0, 2, 32, 1, "linear")),
        # 48 of 64, 12 of them shared.
        (8192, 64, 0.25, LayerShape(12 * 128, 52, 128, 36, "linear")),
    ],
)
def test_shapes_by_hand(neurons: int, slices: int, sparsity: float, expected: LayerShape) -> None:
    shape = LayerSize(32, neurons, slices, sparsity).shape()
    assert shape == expected
    assert shape.total_neurons == neurons
    assert shape.active_neurons == pytest.approx(neurons * (1 - sparsity))


@pytest.mark.parametrize(
    ("neurons", "slices", "sparsity", "message"),
    [
        (64, 8, 0.05, r"sparsity 0\.05 leaves 8 of 8 experts active"),
        (64, 8, 0.95, r"sparsity 0\.95 leaves 0 of 8 experts active"),
        # Neurons that are left over are not given to the shared expert, as without a width multiple
        # in a partition.
        (66, 8, 0.25, "66 neurons do not divide into 8 slices"),
        (64, 1, 0.25, "64 neurons do not divide into 1 slices"),
    ],
)
def test_impossible_sizes(neurons: int, slices: int, sparsity: float, message: str) -> None:
    with pytest.raises(WeaverError, match=message):
        LayerSize(32, neurons, slices, sparsity).shape()


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[LayerCase]:
    """Record the layers that are timed, in order, with a single copy of each to save time."""
    timed: list[LayerCase] = []
    measure = layers.measure_layer

    def recorded(case: LayerCase, tokens: int, level: FfnLevel, **more: Any) -> BenchRow:
        timed.append(case)
        return measure(case, tokens, level, **more)

    monkeypatch.setattr(layers, "STACK_BYTES", 1)
    monkeypatch.setattr(bench_layers, "measure_layer", recorded)
    return timed


@pytest.fixture(scope="module")
def converted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished conversion of four layers of 8 slices; not to be changed."""
    run_dir = tmp_path_factory.mktemp("bench-layers") / "run"
    run_stages(run_config(tiny_llama), run_dir, until="assemble")
    return run_dir


def scores(case: LayerCase) -> Tensor:
    """Mean score of every expert."""
    assert case.module.router is not None
    bias_E = case.module.router.bias
    return torch.zeros(case.module.shape.n_routed_experts) if bias_E is None else bias_E.float()


@pytest.mark.parametrize("level", ["layer", "kernel"])
@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_a_size(cases: list[LayerCase], level: FfnLevel, routing: Any, tmp_path: Path) -> None:
    context, size = StageContext(tmp_path, seed=3), LayerSize(32, 64, 8, 0.25)
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    result = bench_size(context, config, size, level, routing)
    header = result.header
    assert (header.level, header.routing, header.dtype) == (level, routing, "bfloat16")
    assert header.peak_memory_bytes is not None
    assert header.peak_memory_bytes > 2**20
    assert [(row.layer, row.tokens, row.phase) for row in result.rows] == [
        (None, 1, "decode"),
        (None, 6, "prefill"),
    ]
    case = cases[0]
    assert case.x_TD.shape == (6, 32)
    assert case.module.shape.total_neurons == 64
    assert bool(scores(case).any()) == (routing == "skewed")
    # Nothing is written, and another seed is another layer.
    assert list(tmp_path.iterdir()) == []
    bench_size(StageContext(tmp_path, seed=4), config, size, level, routing)
    assert not torch.equal(cases[-1].x_TD, case.x_TD)


def test_the_threads_are_those_of_the_configuration(cases: list[LayerCase], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    config = CONFIG.model_copy(update={"threads": before + 1})
    size = LayerSize(32, 64, 8, 0.25)
    result = bench_size(StageContext(tmp_path), config, size, "kernel", "uniform")
    assert result.header.threads == before + 1
    assert torch.get_num_threads() == before


def test_a_size_has_no_real_routing(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="no real routing for an FFN that is only a size") as e:
        bench_size(StageContext(tmp_path), CONFIG, LayerSize(32, 64, 8, 0.25), "layer", "real")
    assert e.value.why == "it is recorded from a converted model on text"
    assert e.value.fix.startswith("--routing uniform or skewed")


@pytest.mark.parametrize("level", ["layer", "kernel"])
def test_what_reaches_the_layers_on_text(
    cases: list[LayerCase],
    level: FfnLevel,
    converted: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Some copies, which are not modules of the model.
    monkeypatch.setattr(layers, "STACK_BYTES", 3 * 3 * 64 * 32 * 4)
    context = StageContext(converted)
    result = bench_run(context, CONFIG, [3, 1], level, "real")
    assert (result.header.level, result.header.routing) == (level, "real")
    assert [(row.layer, row.tokens) for row in result.rows] == [(3, 1), (3, 6), (1, 1), (1, 6)]
    assert cases[0] is cases[1]
    assert cases[2] is cases[3]

    model = load_converted(converted / "model")
    ffns = ffns_of(model)
    seen: dict[int, Tensor] = {}

    def keep(module: nn.Module, _arguments: Any, output: Tensor) -> None:
        seen[ffns.index(module)] = output[0]  # type: ignore[arg-type]

    for layer in (1, 3):
        ffns[layer].register_forward_hook(keep)
    ids_1T = prompt(open_converted(context), 6)[None, :6]
    with torch.no_grad():
        model(input_ids=ids_1T)
    checkpoint = Checkpoint(ModelConfig(path=str(tiny_llama)))
    for layer, case in ((3, cases[0]), (1, cases[2])):
        # The same inputs and the same module give the same outputs.
        assert case.x_TD.shape == (6, 32)
        torch.testing.assert_close(case.module(case.x_TD), seen[layer])
        dense = checkpoint.ffn(layer, torch.float32)
        assert torch.equal(case.dense.gate_FD, dense.gate_FD)
        assert torch.equal(case.dense.down_FD, dense.down_FD)


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_random_inputs_of_a_runs_shapes(
    cases: list[LayerCase], converted: Path, routing: Any
) -> None:
    context = StageContext(converted, seed=3)
    result = bench_run(context, CONFIG, [], "kernel", routing)
    assert result.header.routing == routing
    # Without a layer the one in the middle.
    assert [row.layer for row in result.rows] == [2, 2]
    (real,) = {shape.active_neurons for shape in open_converted(context).shapes()}
    for case in cases:
        assert case.module.shape.active_neurons == real == 48
        assert case.x_TD.shape == (6, 32)
        assert bool(scores(case).any()) == (routing == "skewed")
    bench_run(StageContext(converted, seed=4), CONFIG, [], "kernel", routing)
    assert not torch.equal(cases[-1].x_TD, cases[0].x_TD)


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_is_not_there(converted: Path, layer: int) -> None:
    with pytest.raises(WeaverError, match=f"layer {layer} has no routed experts") as caught:
        bench_run(StageContext(converted), CONFIG, [0, layer], "kernel", "uniform")
    assert caught.value.why.startswith("the model has layers 0 to 3, and static ones have no")
    assert caught.value.fix == "--layer N with another layer"


def test_a_static_layer(tiny_llama: Path, tmp_path: Path) -> None:
    static = run_config(tiny_llama, partition={"method": "flap", "num_experts": None})
    run_stages(static, tmp_path, until="assemble")
    with pytest.raises(WeaverError, match="layer 2 has no routed experts"):
        bench_run(StageContext(tmp_path), CONFIG, [], "kernel", "real")


def test_a_run_that_is_not_converted(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match="model: no finished assemble stage"):
        bench_run(StageContext(tmp_path), CONFIG, [], "kernel", "uniform")


def test_a_spent_budget_leaves_one_round(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"repeats": 5, "seconds": 1e-9})
    size = LayerSize(32, 64, 8, 0.25)
    result = bench_size(StageContext(tmp_path), config, size, "layer", "uniform")
    assert all(row.dense_p10_ms == row.dense_p90_ms for row in result.rows)
