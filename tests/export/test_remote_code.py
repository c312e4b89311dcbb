"""The file that travels with a model folder: the same model where weaver is not installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import without_weaver
from accelerate import init_empty_weights
from byte_tokenizer import byte_tokenizer
from featured_models import FEATURES, write_featured
from safetensors.torch import load_file
from tiny_conversions import ffns_of, load_converted
from tiny_models import TINY, model_type, random_ids, save_tiny_model, tiny_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.export.remote import modeling_weaver
from weaver.export.remote_code import PACING, SOURCE, add_remote_code
from weaver.kernels import ops
from weaver.models.accounting import LayerShape
from weaver.models.checkpoint import Checkpoint
from weaver.models.families import FAMILIES
from weaver.models.hf import CONVERTED, converted_config, register
from weaver.models.moe import MoEFeedForward

IDS_WT = random_ids(2, 20)
# Every family, every feature, and every feature in half precision.
CASES = (
    *(
        (variant, feature, torch.float32)
        for variant in TINY
        for feature in ("mixed", "compensated")
    ),
    *(("llama+bias", feature, torch.float32) for feature in ("top-k", "glu", "threshold")),
    *(("llama+bias", feature, torch.bfloat16) for feature in FEATURES),
)
NAMES = tuple(f"{variant} {feature} {str(dtype)[6:]}" for variant, feature, dtype in CASES)


@dataclass(frozen=True)
class Outside:
    """Results of models with remote code from a process that cannot import weaver."""

    folder: Path
    said: dict[str, Any]

    def model(self, name: str) -> Path:
        return self.folder / name / "moe"

    def results(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name / "results.safetensors")


def write_model(folder: Path, variant: str, feature: str, dtype: torch.dtype) -> Path:
    save_tiny_model(variant, folder / "dense", byte_tokenizer(), dtype=dtype)
    checkpoint = Checkpoint(ModelConfig(path=str(folder / "dense")))
    return write_featured(checkpoint, feature, folder / "moe", dtype)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """Every case with remote code, loaded in one process that cannot import weaver."""
    folder = tmp_path_factory.mktemp("outside")
    models = {}
    for name, case in zip(NAMES, CASES, strict=True):
        add_remote_code(write_model(folder / name, *case))
        models[name] = {
            "folder": str(folder / name / "moe"),
            "results": str(folder / name / "results.safetensors"),
            "save": str(folder / name / "saved") if name in SAVED else None,
        }
    job = {
        "models": models,
        "refused": models[NAMES[0]]["folder"],
        "ids": IDS_WT.tolist(),
        "threads": torch.get_num_threads(),
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-I", without_weaver.__file__, folder / "job.json"],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Outside(folder, json.loads(done.stdout.splitlines()[-1]))


SAVED = ("llama+bias mixed float32", "phi3 compensated float32")


@pytest.mark.slow
def test_the_same_model_without_weaver(outside: Outside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: "grouped")
    assert outside.said["imported"] == []
    for name, (variant, _, dtype) in zip(NAMES, CASES, strict=True):
        model = load_converted(outside.model(name))
        classes = CONVERTED[model_type(variant)]
        said, found = outside.said[name], outside.results(name)
        expected = [classes.config, classes.backbone, classes.causal_lm]
        assert said["classes"] == [each.__name__ for each in expected], name
        assert all(each.startswith("transformers_modules.") for each in said["modules"]), name
        assert said["problems"] == [[], []], name
        with torch.no_grad():
            logits = model(IDS_WT).logits
            generated = model.generate(  # type: ignore[operator]
                IDS_WT, do_sample=False, max_new_tokens=4, min_new_tokens=4
            )
        assert found["logits"].dtype == dtype, name
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        assert torch.allclose(found["logits"], logits, rtol=tolerance, atol=tolerance), name
        assert torch.equal(found["generated"], generated), name
        assert torch.equal(found["hidden"], found["model_hidden"]), name


@pytest.mark.slow
def test_without_trust_nothing_is_run(outside: Outside) -> None:
    assert "trust_remote_code=True" in outside.said["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_a_model_saved_without_weaver(outside: Outside, name: str) -> None:
    """Its folder has the code again, and weaver loads it bit for bit."""
    saved = outside.folder / name / "saved"
    assert (saved / SOURCE.name).read_bytes() == SOURCE.read_bytes()
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (outside.model(name), saved)
    )
    assert after["auto_map"] == before["auto_map"]
    assert after["weaver"] == before["weaver"]
    first, second = load_converted(outside.model(name)), load_converted(saved)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("trust", [True, False, None])
def test_with_weaver_its_own_classes_are_used(tmp_path: Path, trust: bool | None) -> None:
    folder = write_model(tmp_path, "gemma2", "mixed", torch.float32)
    with torch.no_grad():
        before = load_converted(folder)(IDS_WT).logits
        add_remote_code(folder)
        register()
        classes = CONVERTED["gemma2"]
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        backbone = AutoModel.from_pretrained(folder, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        assert (type(model), type(backbone)) == (classes.causal_lm, classes.backbone)
        assert type(config) is classes.config
        assert torch.equal(model(IDS_WT).logits, before)
    # They save no code, and so no entry that would point to it.
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    config.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))


def test_what_is_added_to_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gemma3_text", "mixed", torch.float32)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    before = json.loads(files.pop("config.json"))
    for _ in range(2):
        add_remote_code(folder)
        after = json.loads((folder / "config.json").read_text())
        assert after.pop("auto_map") == {
            "AutoConfig": "modeling_weaver.WeaverGemma3TextConfig",
            "AutoModel": "modeling_weaver.WeaverGemma3TextModel",
            "AutoModelForCausalLM": "modeling_weaver.WeaverGemma3ForCausalLM",
        }
        assert after == before
        now = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert now.pop("modeling_weaver.py") == SOURCE.read_bytes()
        assert now.pop("pacing.py") == PACING.read_bytes()
        del now["config.json"]
        assert now == files


@pytest.mark.parametrize("found", ["llama", "weaver_gpt2", "weaver_weaver_llama", None])
def test_a_model_of_another_type(tmp_path: Path, found: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": found}))
    with pytest.raises(WeaverError, match=f"model_type '{found}' needs no code of weaver's"):
        add_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match=r"config\.json: missing"):
        add_remote_code(tmp_path)


def test_the_files_need_torch_and_transformers_only() -> None:
    assert _imported(SOURCE) == {"__future__", "typing", "torch", "transformers", "pacing"}
    standard = {"__future__", "collections", "dataclasses", "inspect", "typing"}
    assert _imported(PACING) == {"torch", "transformers"} | standard


def _imported(source: Path) -> set[str]:
    tree = ast.parse(source.read_text())
    return {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "." * node.level]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }


def remote_class(name: str) -> Any:
    """A class of the remote file."""
    return getattr(modeling_weaver, name)


def remote_config(model: PreTrainedModel) -> Any:
    """A model's configuration as the remote file's class."""
    name = type(model.config).__name__
    return remote_class(name)(**model.config.to_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_of_every_family(family: str) -> None:
    classes = CONVERTED[family]
    config_class = remote_class(classes.config.__name__)
    causal_lm = remote_class(classes.causal_lm.__name__)
    assert config_class.model_type == classes.config.model_type
    assert causal_lm.config_class is config_class
    assert remote_class(classes.backbone.__name__).config_class is config_class
    assert remote_class(classes.causal_lm.__name__) is causal_lm
    # A model from its configuration alone starts as weaver's does.
    shape = LayerShape(8, 5, 8, 2, "linear", router_bias=True, expert_bias=True, output_bias=True)
    values = converted_config(tiny_config(family), [shape] * 3, {}).to_dict()
    model = causal_lm(config_class(**values))
    assert model(IDS_WT).logits.isfinite().all()
    layer = model.get_submodule("model.layers.2.mlp")
    assert layer.gate_weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert layer.expert_bias.abs().max() == layer.router.scale.abs().max() == 0


def test_a_class_that_transformers_does_not_have() -> None:
    with pytest.raises(AttributeError, match="NothingConfig"):
        _ = modeling_weaver.WeaverNothingConfig
    with pytest.raises(AttributeError, match="LlamaConfig"):
        _ = modeling_weaver.LlamaConfig


def remote_layer(ffn: MoEFeedForward) -> modeling_weaver.MoEFeedForward:
    """The remote layer with a layer's weights."""
    hidden = ffn.gate_weight.shape[1]
    layer = modeling_weaver.MoEFeedForward(ffn.shape.to_dict(), hidden, ACT2FN["silu"], 0.02)
    layer.to(ffn.gate_weight.dtype)
    layer.load_state_dict(ffn.state_dict())
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", FEATURES)
def test_layers_and_their_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feature: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(ops, "choose_path", lambda *_: "grouped")
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    model = load_converted(write_model(tmp_path, "llama+bias", feature, dtype))
    x_WTD = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    for ffn in ffns_of(model):
        layer = remote_layer(ffn)
        found, expected = layer(x_WTD), ffn(x_WTD)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        found.float().square().mean().backward()
        expected.float().square().mean().backward()
        ours = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        theirs = {name: p.grad for name, p in ffn.named_parameters() if p.grad is not None}
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(
                ours[name], gradient, rtol=tolerance, atol=tolerance, msg=name
            )


@pytest.mark.parametrize("feature", FEATURES)
def test_the_interface_of_experts(tmp_path: Path, feature: str) -> None:
    model = load_converted(write_model(tmp_path, "llama+bias", feature, torch.float32))
    x_WTD = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(1))
    x_TD = x_WTD.flatten(0, 1)
    for ffn in ffns_of(model):
        layer = remote_layer(ffn)
        if ffn.router is None:
            assert layer.experts is None
            continue
        assert ffn.experts is not None
        assert layer.experts is not None
        assert layer.router is not None
        ids_TK, factors_TK = layer.router(x_TD)
        expected = ffn.experts(x_WTD, ids_TK, factors_TK)
        found = layer.experts(x_WTD, ids_TK.int(), factors_TK)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.experts.forward(x_TD, ids_TK, factors_TK), found.flatten(0, 1))


def test_experts_that_nobody_chose_are_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_converted(write_model(tmp_path, "llama", "top-k", torch.float32))
    layer = remote_layer(ffns_of(model)[0])
    computed: list[tuple[int, int]] = []
    hidden = layer._hidden

    def recorded(x_TD: Tensor, begin: int, end: int) -> Tensor:
        computed.append((begin, len(x_TD)))
        return hidden(x_TD, begin, end)

    monkeypatch.setattr(layer, "_hidden", recorded)
    x_TD = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    assert layer.router is not None
    counts = layer.router(x_TD)[0].flatten().bincount(minlength=5).tolist()
    layer(x_TD)
    assert 0 in counts
    # Eight shared neurons, then eight per expert.
    chosen = [(8 + 8 * expert, count) for expert, count in enumerate(counts) if count]
    assert computed == [(0, 3), *chosen]


def test_a_server_builds_the_backbone_first_and_loads_parameters_by_name(tmp_path: Path) -> None:
    """Without a buffer of its own: loaders of some runtimes know parameters only."""
    native: Any = load_converted(write_model(tmp_path, "llama", "compensated", torch.float32))
    with init_empty_weights(include_buffers=False):
        backbone = remote_class("WeaverLlamaModel")(remote_config(native)).eval()
    tensors = native.base_model.state_dict()
    parameters = dict(backbone.named_parameters())
    assert parameters.keys() == tensors.keys()
    assert all(parameter.is_meta for parameter in parameters.values())
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        setattr(backbone.get_submodule(owner), last, nn.Parameter(tensor, requires_grad=False))
    with torch.no_grad():
        found = backbone(IDS_WT, use_cache=False).last_hidden_state
        expected = native.base_model(IDS_WT, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_on_disk(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "llama+bias", "mixed", torch.float32)
    places = {f"model.layers.{layer}": "disk" for layer in range(3)}
    for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"):
        places[name] = "cpu"
    causal_lm = remote_class("WeaverLlamaForCausalLM")
    model = causal_lm.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
    assert model.get_submodule("model.layers.2.mlp.router").weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(IDS_WT).logits, causal_lm.from_pretrained(folder)(IDS_WT).logits)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["mixed", "compensated"])
def test_a_graph_of_the_whole_forward(tmp_path: Path, feature: str) -> None:
    native = load_converted(write_model(tmp_path, "llama", feature, torch.float32))
    model = remote_class("WeaverLlamaForCausalLM")(remote_config(native)).eval()
    model.load_state_dict(native.state_dict())
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(IDS_WT, use_cache=False).logits
        torch.testing.assert_close(found, model(IDS_WT).logits, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_the_file_is_part_of_the_package() -> None:
    """Packages are found by their ``__init__.py``, from the package down to the file."""
    folder = SOURCE.parent
    while folder.name != "weaver":
        assert (folder / "__init__.py").is_file()
        folder = folder.parent
