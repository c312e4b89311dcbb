"""``eval --router`` on a tiny conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_conversions import ffns_of, load_converted
from tiny_runs import read_results, run_config, run_stages
from torch import Tensor

from weaver.algorithms.glu import glu_hidden
from weaver.artifacts.results import EvalResult
from weaver.artifacts.store import values_digest
from weaver.artifacts.types import FIRST_TOKENS
from weaver.data.packing import windows
from weaver.data.sources import read_documents
from weaver.errors import WeaverError
from weaver.models.checkpoint import Checkpoint
from weaver.rundir.stage_run import StageContext
from weaver.stages.router_report import half_profiles, open_report

LAYERS = 4
FIDELITY = ("oracle_agreement", "chance_agreement", "captured_contribution")


@pytest.fixture(scope="module")
def calibration(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "shared"
    run_stages(run_config(tiny_llama), run_dir, until="calibrate")
    return run_dir / "calibrate"


def report_of(method: str, model: Path, calibration: Path, run_dir: Path) -> dict[str, Any]:
    """The report of a converted tiny model."""
    experts = None if method in {"flap", "wanda-sp"} else 8
    config = run_config(
        model, partition={"method": method, "num_experts": experts}, eval={"router": True}
    )
    manifests = run_stages(config, run_dir, until="eval", calibration=calibration)
    results = read_results(run_dir)
    assert EvalResult.model_validate(results).router is not None
    assert manifests["eval"].summary["router"] == results["router"]
    assert {"calibrate", "partition"} <= manifests["eval"].request.inputs.keys()
    report: dict[str, Any] = results["router"]
    assert [row["layer"] for row in report["layers"]] == list(range(LAYERS))
    for name, mean in report["mean"].items():
        values = [row[name] for row in report["layers"]]
        assert mean == (None if None in values else pytest.approx(sum(values) / LAYERS))
    assert sum(report["half_tokens"]) == 512
    return report


@pytest.mark.parametrize("method", ["cmoe", "expertweaver"])
def test_routed_layers_have_every_value(
    method: str, tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    report = report_of(method, tiny_llama, calibration, tmp_path)

    assert report["method"] == method
    assert report["tokens"] == 4 * (64 - FIRST_TOKENS)
    for row in report["layers"]:
        assert None not in row.values()
        assert 0 < row["expert_jaccard"] < 1
        assert 0 < row["shared_jaccard"] <= 1
        assert 0 < row["score_correlation"] < 1


def test_the_fidelity_is_that_of_the_converted_model_on_its_own_inputs(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    report = report_of("cmoe", tiny_llama, calibration, tmp_path)
    tokenizer = Checkpoint(run_config(tiny_llama).model).tokenizer()
    documents = read_documents("builtin:held-out", None)
    windows_WT = windows(documents, tokenizer, sequence_length=64, limit=4)
    assert values_digest({"windows_WT": windows_WT}) == read_results(tmp_path)["digests"]["data"]
    model = load_converted(tmp_path / "model").eval()
    for layer, ffn in enumerate(ffns_of(model)):
        inputs: list[Tensor] = []
        hook = ffn.register_forward_pre_hook(lambda _, args, seen=inputs: seen.append(args[0]))
        with torch.no_grad():
            model(windows_WT)
            hook.remove()
            x_TD = inputs[0].reshape(256, -1)
            hidden_TEN = glu_hidden(x_TD, ffn.weights())[
                :, ffn.shape.num_shared_neurons :
            ].unflatten(1, (ffn.num_routed_experts, -1))
            down_END = ffn.down_weight[ffn.shape.num_shared_neurons :].unflatten(
                0, (ffn.num_routed_experts, -1)
            )
            norm_TE = torch.einsum("ten,end->ted", hidden_TEN, down_END).square().sum(-1)
            routing = ffn.routing(x_TD)
            assert routing is not None
            chosen_TE = routing.factors_TE() > 0
            best_TK = norm_TE.topk(ffn.top_k).indices
            agreement = chosen_TE.gather(1, best_TK).sum() / best_TK.numel()
            captured = norm_TE[chosen_TE].sum() / norm_TE.gather(1, best_TK).sum()
        row = report["layers"][layer]
        assert row["oracle_agreement"] == pytest.approx(float(agreement), abs=0.01)
        assert row["captured_contribution"] == pytest.approx(float(captured), abs=0.01)
        assert row["chance_agreement"] == ffn.top_k / ffn.num_routed_experts


def test_a_split_that_ignores_the_text_is_stable(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    report = report_of("random", tiny_llama, calibration, tmp_path)

    for row in report["layers"]:
        assert row["expert_jaccard"] == 1
        assert row["shared_jaccard"] is None
        assert row["score_correlation"] is None
        assert row["oracle_agreement"] > 0


def test_a_static_method_has_the_stability_of_its_kept_neurons_only(
    tiny_llama: Path, calibration: Path, tmp_path: Path
) -> None:
    report = report_of("flap", tiny_llama, calibration, tmp_path)

    assert report["tokens"] == 0
    for row in report["layers"]:
        assert [row[name] for name in (*FIDELITY, "expert_jaccard")] == [None] * 4
        # 48 of 64 neurons are kept twice, so at least 32 are common: 32 / 64.
        assert 0.5 <= row["shared_jaccard"] < 1
        assert 0 < row["score_correlation"] < 1


def test_without_the_option_there_is_no_report(tiny_llama: Path, tmp_path: Path) -> None:
    manifests = run_stages(run_config(tiny_llama), tmp_path, until="eval")

    assert read_results(tmp_path)["router"] is None
    assert manifests["eval"].summary["router"] is None
    assert "partition" not in manifests["eval"].request.inputs


def test_halves_are_profiles_of_the_calibrations_own_samples(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """With every input kept, the samples of the halves are those of the calibration, bit by bit.

    With some kept, positions and samples must still belong together, so the halves' samples are
    compared with what the kept inputs alone say.
    """
    run_stages(run_config(tiny_llama), tmp_path, until="partition")
    inputs = open_report(StageContext(tmp_path))
    full = inputs.partition.calibration.profile(1)
    halves = half_profiles(inputs, 1)

    assert sum(half.tokens for half in halves) == full.tokens == 512
    seen = []
    for half_n, half in zip(inputs.halves, halves, strict=True):
        samples_m = inputs.sample_ids_N[half_n].unique()
        seen += samples_m.tolist()
        torch.testing.assert_close(half.sample_gate_mean_MF, full.sample_gate_mean_MF[samples_m])
        assert torch.equal(half.sample_tokens_M, full.sample_tokens_M[samples_m])
        assert torch.equal(half.sample_groups_M, full.sample_groups_M[samples_m])
        assert torch.equal(half.marker_neurons_TA, full.marker_neurons_TA[half_n])
    assert sorted(seen) == list(range(full.sample_tokens_M.numel()))


def test_kept_inputs_know_their_samples(tiny_llama: Path, tmp_path: Path) -> None:
    """Of 512 inputs 100 are kept: each is the one of the full profile at its position."""
    run_stages(run_config(tiny_llama), tmp_path / "all", until="partition")
    hidden = Checkpoint(run_config(tiny_llama).model).hidden_size
    some = run_config(tiny_llama, calibrate={"input_sample_mb": 100 * hidden * 4 / 1e6})
    run_stages(some, tmp_path / "some", until="partition")
    inputs = open_report(StageContext(tmp_path / "some"))
    everything = open_report(StageContext(tmp_path / "all"))

    kept_ND = inputs.partition.calibration.profile(0).ffn_inputs_ND
    all_ND = everything.partition.calibration.profile(0).ffn_inputs_ND
    same_NN = (kept_ND[:, None] == all_ND[None]).all(-1)

    assert kept_ND.shape[0] == inputs.sample_ids_N.numel() == 100
    for position, sample in enumerate(inputs.sample_ids_N.tolist()):
        places = same_NN[position].nonzero().flatten()
        assert sample in everything.sample_ids_N[places].tolist()


def test_two_samples_are_too_few(tiny_llama: Path, tmp_path: Path) -> None:
    config = run_config(tiny_llama, calibrate={"tokens": 64})
    run_stages(config, tmp_path, until="partition")

    with pytest.raises(WeaverError, match="keep FFN inputs of 2 calibration samples") as caught:
        open_report(StageContext(tmp_path))
    assert "--no-router" in caught.value.fix
