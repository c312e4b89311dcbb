"""``weaver generate`` as a command: text on standard output, one line on standard error."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import tiny_model
from tiny_runs import file_times, run_config, run_stages, run_weaver
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

import weaver.cli.app
from weaver.evaluation.generation import Decoding, generate_ids

PROMPT = "The whale"
SPEED = r"(\d+) tokens in [\d.]+ (us|ms|s), [\d.e+]+ tokens/s"


def generate(*words: str | Path, stdin: str | None = None) -> Result:
    arguments = ["generate", *map(str, words)]
    return CliRunner().invoke(weaver.cli.app.app, arguments, input=stdin)


def refusal(*words: str | Path) -> tuple[str, str, str]:
    """Run a command that is refused and return the what, why and fix of its error."""
    result = generate(*words)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    match = re.fullmatch(r"error: (.+)\n  why: (.+)\n  fix: (.+)\n", result.stderr)
    assert match, result.stderr
    what, why, fix = match.groups()
    return what, why, fix


def expected(model: PreTrainedModel, prompt: str = PROMPT, tokens: int = 64) -> str:
    ids_1T = torch.tensor([list(prompt.encode())])
    (new_N,) = generate_ids(model, ids_1T, Decoding(tokens))
    return str(byte_tokenizer().decode(new_N, skip_special_tokens=True))


@pytest.fixture(scope="module")
def dense(tiny_llama: Path) -> PreTrainedModel:
    """The tiny Llama that was saved."""
    changes = {"num_hidden_layers": 4, "intermediate_size": 64, "max_position_embeddings": 512}
    return tiny_model("llama", **changes)


@pytest.fixture(scope="module")
def run_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "run"
    run_stages(run_config(tiny_llama), folder, until="assemble")
    return folder


def test_the_program_itself(run_dir: Path) -> None:
    """Nothing but text on standard output, nothing but the speed on standard error."""
    before = file_times(run_dir)

    done = run_weaver("generate", run_dir, PROMPT, "--max-new-tokens", "12", "--threads", "1")

    assert done.returncode == 0, done.stderr
    inside = generate(run_dir, PROMPT, "--max-new-tokens", "12")
    assert done.stdout == inside.stdout
    assert len(done.stdout) > 1
    found = re.fullmatch(f"{SPEED}\n", done.stderr)
    assert found, done.stderr
    assert found[1] == "12"
    assert file_times(run_dir) == before


def test_text_comes_token_by_token(tiny_llama: Path) -> None:
    """A reader that has seen enough closes the pipe; the program ends without a stack trace."""
    words = [sys.executable, "-m", "weaver", "generate", str(tiny_llama), PROMPT]
    with subprocess.Popen(
        [*words, "--max-new-tokens", "490", "--temperature", "1"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read().decode()
        process.wait(timeout=60)
    assert process.returncode == 1
    assert said == ""


def test_defaults_are_greedy(tiny_llama: Path, dense: PreTrainedModel) -> None:
    result = generate(tiny_llama, PROMPT)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected(dense) + "\n"
    assert re.match(SPEED, result.stderr)


def test_the_prompt_from_standard_input(tiny_llama: Path, dense: PreTrainedModel) -> None:
    result = generate(tiny_llama, "-", "--max-new-tokens", "8", stdin=f"{PROMPT}\n")
    assert result.stdout == expected(dense, tokens=8) + "\n"


def test_drawing(tiny_llama: Path) -> None:
    def drawn(*flags: str) -> str:
        result = generate(tiny_llama, PROMPT, "--temperature", "1.5", *flags)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert drawn() == drawn("--seed", "0") == drawn("--top-p", "1")
    assert drawn("--seed", "1") != drawn()
    assert drawn("--top-p", "0") == generate(tiny_llama, PROMPT).stdout != drawn()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--top-p", "0.9"), "--top-p"),
        (("--seed", "1"), "--seed"),
        (("--seed", "0", "--top-p", "1", "--temperature", "0"), "--top-p, --seed"),
    ],
)
def test_flags_that_would_do_nothing(flags: tuple[str, ...], named: str, tiny_llama: Path) -> None:
    what, why, fix = refusal(tiny_llama, PROMPT, *flags)
    assert what == f"{named} would do nothing at temperature 0"
    assert why == "the most probable token is taken, nothing is drawn"
    assert fix == f"--temperature 0.7, or leave {named.replace(', ', ' and ')} out"


def test_text_that_runs_in_circles_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    with torch.no_grad():
        looping: Any = tiny_model("llama", num_hidden_layers=0, tie_word_embeddings=False)
        # The last token is the most probable next one.
        looping.get_output_embeddings().weight.copy_(looping.get_input_embeddings().weight)
        looping.base_model.norm.weight.fill_(1.0)
    looping.save_pretrained(model)

    greedy = generate(model, PROMPT)
    assert greedy.stdout == "e" * 64 + "\n"
    line = greedy.stderr.splitlines()[-1]
    assert line == (
        "degenerate: 98% of the 4-grams repeat earlier ones; --temperature 0.7 draws; "
        "see whether the dense model does so too"
    )
    assert "degenerate" not in generate(model, PROMPT, "--max-new-tokens", "8").stderr
    cold = generate(model, PROMPT, "--temperature", "0.01").stderr.splitlines()[-1]
    assert cold.startswith("degenerate: 98% of the 4-grams repeat earlier ones; see whether")


def test_chat_without_a_template(tiny_llama: Path) -> None:
    what, _, fix = refusal(tiny_llama, PROMPT, "--chat")
    assert what == f"{tiny_llama}: the tokenizer has no chat template"
    assert fix == "leave --chat out"


def test_a_run_without_a_model(tiny_llama: Path, tmp_path: Path) -> None:
    run_stages(run_config(tiny_llama), tmp_path, until="calibrate")
    what, _, fix = refusal(tmp_path, PROMPT)
    assert what == f"{tmp_path}/model: no finished assemble stage"
    assert fix == f"weaver assemble --run-dir {tmp_path}"


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "1", "--top-p", "1.1"),
        ("--dtype", "int8"),
        ("--threads", "0"),
    ],
)
def test_values_outside_their_range(flags: tuple[str, ...], tiny_llama: Path) -> None:
    result = generate(tiny_llama, PROMPT, *flags)
    assert result.exit_code == 2
    assert flags[-2] in result.stderr
