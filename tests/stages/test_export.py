"""``export`` writes what other runtimes load, and ``verify`` sees whether it is the same."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import add_to_stage, file_times, run_config, run_stages
from transformers import AutoModelForCausalLM

from weaver.artifacts.manifest import StageManifest
from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import Router
from weaver.artifacts.verification import Verification
from weaver.config.sections import ExportConfig, VerifyConfig
from weaver.errors import WeaverError
from weaver.export.fresh import fresh_model
from weaver.rundir.stage_run import StageContext
from weaver.stages.export import export, plan_export
from weaver.stages.verify import verify

TEXT = VerifyConfig(tokens=128, sequence_length=64, new_tokens=8)


def write(
    run_dir: Path, *, out: Path | None = None, force: bool = False, **options: Any
) -> StageManifest:
    context = StageContext(run_dir, force=force)
    plan = plan_export(context, ExportConfig.model_validate(options), out)
    return export(context, plan)


def compare(run_dir: Path, folder: Path) -> Verification:
    return verify(StageContext(run_dir), folder, TEXT)


@pytest.fixture(scope="module")
def run_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a linear router and splits that differ between layers; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    partition = {"method": "expertweaver", "num_experts": 8, "sparsity": 0.25}
    run_stages(run_config(tiny_llama, partition=partition), folder, until="assemble")
    return folder


@pytest.fixture(scope="module")
def weave_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that selects by threshold and has constants; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "weave"
    run_stages(run_config(tiny_llama, partition={"method": "weave"}), folder, until="assemble")
    return folder


def test_the_best_target_loads_without_weaver_and_computes_the_same(
    run_dir: Path, tmp_path: Path
) -> None:
    manifest = write(run_dir, out=tmp_path / "out")
    assert manifest.summary["target"] == "glm4-moe"
    assert "holds the model exactly" in manifest.summary["reason"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest.outputs)
    assert (tmp_path / "out" / "README.md").exists()
    result = compare(run_dir, tmp_path / "out")
    assert result.loaded_as == "Glm4MoeForCausalLM"
    assert result.kl is not None
    assert 0 <= result.kl < 1e-6
    assert result.tokens == 126
    assert result.top1_agreement == 1
    assert result.same_text == 1
    assert result.topk_agreement is not None
    assert result.topk_agreement > 0.99
    assert result.native_perplexity == pytest.approx(result.export_perplexity, rel=1e-4)


def test_a_difference_does_not_go_unnoticed(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(run_dir, out=folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            # Other experts are selected; everything else is as it was.
            layer.mlp.gate.weight.mul_(-1)
    shutil.copyfile(folder / "config.json", tmp_path / "config.json")
    written = {"config.json", "generation_config.json", "model.safetensors"}
    model.save_pretrained(folder)
    shutil.copyfile(tmp_path / "config.json", folder / "config.json")
    add_to_stage(folder, [path for path in folder.iterdir() if path.name in written])
    result = compare(run_dir, folder)
    assert result.kl is not None
    assert result.kl > 1e-4
    assert result.topk_agreement is not None
    assert result.topk_agreement < 0.9


def test_the_card_says_how_to_load_it(run_dir: Path, tmp_path: Path) -> None:
    write(run_dir, out=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "transformers' own `glm4_moe`" in card
    assert "import weaver" not in card


def test_a_missing_package_is_said_before_anything_is_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeaverError, match="a GGUF export needs the package gguf") as caught:
        plan_export(StageContext(run_dir), ExportConfig(target="gguf"), tmp_path / "out")
    assert caught.value.fix == "pip install 'weaver-moe[gguf]'"
    assert not (tmp_path / "out").exists()


def test_what_measures_an_approximation_is_there_before_anything_is_written(
    weave_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    config = ExportConfig(target="gguf", approximate=True)
    with pytest.raises(WeaverError, match="of a GGUF file cost needs the package xllamacpp"):
        plan_export(StageContext(weave_dir), config, tmp_path / "out")


def test_a_runtime_that_does_not_run_an_export_is_refused(run_dir: Path, tmp_path: Path) -> None:
    write(run_dir, out=tmp_path / "out")
    for runtime, message in (
        ("llama.cpp", "llama.cpp does not run a glm4-moe export"),
        ("vllm", "a check in vLLM needs the package vllm"),
    ):
        if runtime == "vllm" and find_spec("vllm"):
            continue
        config = TEXT.model_copy(update={"runtime": runtime})
        with pytest.raises(WeaverError, match=message):
            verify(StageContext(run_dir), tmp_path / "out", config)


def test_an_export_runs_in_the_dtype_that_it_is_stored_in(run_dir: Path, tmp_path: Path) -> None:
    write(run_dir, out=tmp_path / "out", dtype="bfloat16")
    result = compare(run_dir, tmp_path / "out")
    assert (result.dtype, result.stored_dtype) == ("float32", "bfloat16")
    assert result.stored_kl is not None
    assert 0 < result.kl < 1e-2
    # Of the first window, and with what is computed rounded too.
    assert 0 < result.stored_kl < 1e-2


def test_a_finished_export_is_skipped_and_another_one_refused(
    run_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = write(run_dir, out=out)
    times = file_times(out)
    assert write(run_dir, out=out).digest == first.digest
    assert file_times(out) == times
    with pytest.raises(WeaverError, match="made with another configuration: dtype"):
        write(run_dir, out=out, dtype="bfloat16")
    assert write(run_dir, out=out, dtype="bfloat16", force=True).dtype == "bfloat16"


def test_an_interrupted_export_keeps_its_shards(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = write(run_dir, out=out, max_shard_size="100KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[-1].unlink()
    (out / "manifest.json").unlink()
    before = file_times(out)
    assert write(run_dir, out=out, max_shard_size="100KB").digest == whole.digest
    after = file_times(out)
    assert all(before[path.name] == after[path.name] for path in shards[:-1])


def test_a_folder_with_other_files_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(WeaverError, match=r"holds files, but no stage\.json"):
        write(run_dir, out=tmp_path)


def test_what_the_target_cannot_hold_is_refused_with_a_way_out(
    weave_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeaverError, match="glm4-moe cannot hold selection by threshold") as caught:
        write(weave_dir, out=tmp_path / "out", target="glm4-moe")
    assert "selection=top-k" in caught.value.fix
    assert not (tmp_path / "out").exists()
    with pytest.raises(WeaverError, match="granite-moe-shared cannot hold router intercepts"):
        write(weave_dir, out=tmp_path / "out", target="granite-moe-shared", approximate=True)


def test_an_approximation_is_measured(weave_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write(weave_dir, out=out, target="glm4-moe", approximate=True)
    cost = manifest.summary["cost"]
    assert 0 < cost["kl"] < 1
    assert 0.3 < cost["topk_agreement"] < 1
    assert len(manifest.summary["approximations"]) == 2
    assert "approximates selection by threshold" in (out / "README.md").read_text()
    assert cost["tokens"] == 1022


def test_the_own_type_needs_its_code_where_there_is_no_weaver(
    weave_dir: Path, tmp_path: Path
) -> None:
    assert write(weave_dir, out=tmp_path / "bare").summary["target"] == "weaver"
    with pytest.raises(WeaverError, match="weaver's own type, without its code"):
        compare(weave_dir, tmp_path / "bare")
    write(weave_dir, out=tmp_path / "code", target="weaver", remote_code=True)
    result = compare(weave_dir, tmp_path / "code")
    assert result.kl is not None
    assert 0 <= result.kl < 1e-6
    assert "trust_remote_code=True" in (tmp_path / "code" / "README.md").read_text()
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    assert "AutoModelForCausalLM" in config["auto_map"]


@pytest.mark.parametrize(
    ("quantisation", "largest"), [("f32", 1e-3), ("f16", 0.05), ("bf16", 0.5), ("q8_0", 1.0)]
)
def test_llama_cpp_gives_the_same_probabilities(
    quantisation: str, largest: float, run_dir: Path, tmp_path: Path
) -> None:
    write(run_dir, out=tmp_path / "out", target="gguf", quantisation=quantisation)
    result = compare(run_dir, tmp_path / "out")
    assert result.loaded_as == "llama.cpp"
    assert result.dtype == quantisation
    assert result.max_logprob_difference is not None
    assert result.mean_logprob_difference is not None
    assert result.mean_logprob_difference <= result.max_logprob_difference < largest
    assert result.top1_agreement > 0.9
    # Every token that was asked for, and a divergence that thresholds can be set for.
    assert result.tokens == 126
    assert 0 <= result.kl < largest**2


def test_what_llama_cpp_lacks_is_refused_before_an_earlier_export_is_thrown_away(
    run_dir: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run_dir, run)
    write(run, out=out, target="gguf")
    before = file_times(out)
    config = json.loads((run / "model" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (run / "model" / "config.json").write_text(json.dumps(config))
    add_to_stage(run / "model", [run / "model" / "config.json"])
    with pytest.raises(WeaverError, match="cannot hold rope scaling of type dynamic"):
        write(run, out=out, target="gguf", force=True)
    assert file_times(out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gptq"}, "no target is called 'gptq'"),
        ({"target": "glm4-moe", "remote_code": True}, "--remote-code does nothing for glm4-moe"),
        ({"target": "weaver", "quantisation": "f16"}, "--quantisation f16 does nothing for weaver"),
        ({"target": "gguf", "dtype": "float16"}, "--dtype float16 does nothing for gguf"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: dict[str, Any], message: str, run_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(WeaverError, match=message):
        write(run_dir, out=tmp_path / "out", **options)


def test_an_export_is_compared_with_the_model_it_was_made_from(
    run_dir: Path, weave_dir: Path, tmp_path: Path
) -> None:
    write(run_dir, out=tmp_path / "out")
    with pytest.raises(WeaverError, match="made from another model than"):
        compare(weave_dir, tmp_path / "out")
    with pytest.raises(WeaverError, match="no finished export"):
        compare(run_dir, tmp_path)


def test_trained_balance_biases_are_seen_in_the_model(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    routers = sorted((copy / "router").glob("layer_*.safetensors"))
    router = read_record(routers[0], Router)
    moved = torch.linspace(-0.1, 0.1, router.weight_ED.shape[0])
    write_record(routers[0], Router("linear", router.weight_ED, router.scale_E, moved))
    add_to_stage(copy / "router", routers[:1])
    shutil.rmtree(copy / "model")
    from weaver.config.sections import AssembleConfig
    from weaver.stages.assemble import assemble

    assemble(StageContext(copy), AssembleConfig(smoke_test=False))
    with pytest.raises(WeaverError, match="cannot hold balance biases"):
        write(copy, target="glm4-moe")


def test_what_does_not_load_elsewhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "weaver_llama"}')
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with (
        pytest.raises(WeaverError, match="does not run without weaver") as caught,
        fresh_model(tmp_path, ids, ids, dtype=torch.float32, router="", remote_code=False),
    ):
        pass
    assert "weaver_llama" in caught.value.why


def test_code_that_is_not_what_weaver_wrote_does_not_run(run_dir: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace"
    write(run_dir, out=out, target="weaver", remote_code=True)
    code = out / "modeling_weaver.py"
    whole = code.read_text()
    code.write_text(f"open({str(trace)!r}, 'w').close()\n{whole}")
    with pytest.raises(WeaverError, match=r"modeling_weaver\.py: digest \w+ instead of"):
        compare(run_dir, out)
    code.write_text(whole)
    (out / "extra.py").write_text("")
    with pytest.raises(WeaverError, match=r"extra\.py: not an output of export"):
        compare(run_dir, out)
    assert not trace.exists()


def test_the_process_of_an_export_has_no_token_and_no_home(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export is given code that writes down its environment, as one with a manifest to match
    would have it."""
    out, trace = tmp_path / "out", tmp_path / "trace"
    write(run_dir, out=out, target="weaver", remote_code=True)
    code = out / "modeling_weaver.py"
    said = f"open({str(trace)!r}, 'w').write(json.dumps(dict(os.environ)))"
    code.write_text(f"{code.read_text()}\nimport json, os\n{said}\n")
    add_to_stage(out, [code])
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    compare(run_dir, out)
    seen = json.loads(trace.read_text())
    assert "secret" not in seen.values()
    assert seen["HOME"] != os.environ["HOME"]
