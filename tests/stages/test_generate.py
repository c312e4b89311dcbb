"""``generate``: which model a name stands for, and what is refused before it is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_runs import run_config, run_stages
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

import weaver
from weaver.config.sections import ModelConfig
from weaver.errors import WeaverError
from weaver.evaluation.generation import Decoding, repetition
from weaver.models import loading
from weaver.stages import generate as stage
from weaver.stages.generate import Generated, generate, model_folder

PROMPT = "The whale"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def run_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an assembled and a fine-tuned model."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    steps = {"steps": 5, "batch_size": 4, "sequence_length": 64, "learning_rate": 1e-2}
    tuning = {**steps, "best_by": "perplexity"}
    run_stages(run_config(tiny_llama, finetune=tuning), folder, until="finetune")
    return folder


def written(model: str | Path, prompt: str = PROMPT, **options: Any) -> tuple[str, Generated]:
    pieces: list[str] = []
    decoding = options.pop("decoding", Decoding(16))
    result = generate(str(model), prompt, decoding, on_text=pieces.append, **options)
    return "".join(pieces), result


def expected(folder: Path, prompt: str = PROMPT, tokens: int = 16) -> str:
    """Generate the greedy continuation of a prompt with transformers' own ``generate``."""
    assert weaver is not None
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids_1T = torch.tensor([list(prompt.encode())])
    new_N = model.generate(ids_1T, max_new_tokens=tokens, do_sample=False)[0, ids_1T.shape[1] :]
    return str(byte_tokenizer().decode(new_N, skip_special_tokens=True))


def test_a_dense_folder(tiny_llama: Path) -> None:
    text, result = written(tiny_llama)
    assert text == expected(tiny_llama)
    assert result.tokens == 16
    assert result.seconds > 0


def test_a_run_stands_for_its_finetuned_or_else_its_assembled_model(
    run_dir: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    assert model_folder(str(run_dir)) == run_dir / "finetune" / "model"
    tuned, _ = written(run_dir)
    assert tuned == expected(run_dir / "finetune" / "model")

    plain = Path(shutil.copytree(run_dir, tmp_path / "run"))
    shutil.rmtree(plain / "finetune")
    assert model_folder(str(plain)) == plain / "model"
    assembled, _ = written(plain)
    assert assembled == expected(plain / "model") == written(plain / "model")[0]
    assert len({assembled, tuned, expected(tiny_llama)}) == 3


def test_a_run_needs_its_dense_model_no_longer(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    run_stages(run_config(model), tmp_path / "run", until="assemble")
    shutil.rmtree(model)
    assert written(tmp_path / "run")[1].tokens == 16


def test_a_run_that_has_not_come_to_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="calibrate")
    with pytest.raises(WeaverError, match="model: no finished assemble stage") as caught:
        written(tmp_path)
    assert caught.value.fix == f"weaver assemble --run-dir {tmp_path}"


def test_a_stock_export(tmp_path: Path) -> None:
    config = Glm4MoeConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=0,
        eos_token_id=257,
        pad_token_id=258,
    )
    torch.manual_seed(0)
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert written(tmp_path)[0] == expected(tmp_path)


@pytest.mark.parametrize("name", ["owner/name", "some/folder/model.gguf"])
def test_other_names_are_found_as_those_of_models_to_convert(
    name: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def locate(model: ModelConfig) -> Path:
        asked.append(model.path)
        return tiny_llama

    monkeypatch.setattr(stage, "locate", locate)
    assert written(name)[0] == expected(tiny_llama)
    assert asked == [name]


def test_drawing_needs_a_seed_to_be_repeated(tiny_llama: Path) -> None:
    texts = [written(tiny_llama, decoding=Decoding(16, 1.5, 1.0, seed))[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_dtype(dtype: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = loading.load_model

    def spy(*arguments: Any, **named: Any) -> Any:
        loaded.append(load(*arguments, **named))
        return loaded[-1]

    monkeypatch.setattr(stage, "load_model", spy)
    written(tiny_llama, dtype=dtype)
    assert loaded[0].dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def test_the_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    with pytest.raises(WeaverError, match="model: the tokenizer has no chat template") as caught:
        written(model, chat=True)
    assert caught.value.fix == "leave --chat out"

    (model / "chat_template.jinja").write_text(TEMPLATE)
    assert written(model, chat=True)[0] == expected(model, f"<user>{PROMPT}<assistant>")
    assert written(model)[0] == expected(model)


@pytest.mark.parametrize(
    ("name", "expected_what"),
    [
        ("nonesuch/model/folder", "no such model"),
        ("empty", "empty: neither a model nor a run directory"),
        ("unsafe", r"unsafe: no \*\.safetensors file"),
        ("wordless", "wordless: no tokenizer"),
        ("damaged", "damaged: cannot be loaded"),
        ("foreign", "weights do not fit the configuration"),
    ],
)
def test_what_is_no_model(name: str, expected_what: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / name
    if name != "nonesuch/model/folder":
        shutil.copytree(tiny_llama, folder)
    if name == "empty":
        (folder / "config.json").unlink()
    if name == "unsafe":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    if name == "wordless":
        (folder / "tokenizer.json").unlink()
    if name == "damaged":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    if name == "foreign":
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 5}))
    with pytest.raises(WeaverError, match=expected_what) as caught:
        written(folder)
    assert "--force" not in caught.value.fix


def test_prompts_that_leave_no_room(tiny_llama: Path) -> None:
    with pytest.raises(WeaverError, match="the prompt has no tokens"):
        written(tiny_llama, "")
    with pytest.raises(WeaverError, match="9 tokens of prompt and 600 new ones") as caught:
        written(tiny_llama, decoding=Decoding(600))
    assert caught.value.why == "the model has 512 positions"
    assert caught.value.fix == "--max-new-tokens 503"
    assert written(tiny_llama, decoding=Decoding(503))[1].tokens <= 503
    with pytest.raises(WeaverError, match="512 tokens of prompt and 16 new ones") as caught:
        written(tiny_llama, "a" * 512)
    assert caught.value.fix == "a shorter prompt"


def test_what_repeats_is_counted(tiny_llama: Path) -> None:
    pieces: list[str] = []
    result = generate(str(tiny_llama), PROMPT, Decoding(200), on_text=pieces.append)
    assert result.tokens > 40
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids_1T = torch.tensor([list(PROMPT.encode())])
    new_N = model.generate(ids_1T, max_new_tokens=200, do_sample=False)[0, ids_1T.shape[1] :]
    assert result.repetition == repetition(new_N.tolist())


def test_a_text_is_degenerate_when_most_of_it_repeats() -> None:
    assert Generated(64, 1.0, 0.6).problem is None
    assert Generated(20, 1.0, 0.9).problem is None
    problem = Generated(64, 1.0, 0.75).problem
    assert problem is not None
    assert re.fullmatch("75% of the 4-grams repeat earlier ones", problem)
