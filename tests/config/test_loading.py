"""The configuration: what a file may say, and which of file, override and flag wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from weaver.config.loading import (
    RunConfig,
    load_device,
    load_run_config,
    load_section,
    load_seed,
    parse_config,
)
from weaver.config.sections import CalibrateConfig, EvalConfig, ModelConfig, PartitionConfig
from weaver.errors import WeaverError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "run.yaml"
    found.write_text(
        "model: models/tiny\n"
        "seed: 7\n"
        "partition:\n"
        "  method: cmoe\n"
        "  sparsity: 0.5\n"
        "  options: {activation_top_k: 10}\n"
    )
    return found


def test_a_file(path: Path) -> None:
    config = load_run_config(path)
    assert config.model == ModelConfig(path="models/tiny")
    assert config.seed == 7
    assert config.partition.method == "cmoe"
    assert config.partition.options == {"activation_top_k": 10}
    assert config.calibrate == CalibrateConfig()
    assert config.finetune is None


def test_an_empty_finetune_section_asks_for_it(path: Path) -> None:
    config = load_run_config(path, ["finetune={}"])
    assert config.finetune is not None
    assert config.finetune.steps == 50


def test_a_configuration_does_not_change() -> None:
    config = RunConfig(model=ModelConfig(path="m"))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, "seed", 1)  # noqa: B010


def test_overrides(path: Path) -> None:
    config = load_run_config(
        path,
        [
            "partition.sparsity=0.125",
            "partition.options.activation_top_k=20",
            "calibrate.data=[a.jsonl:0.5, b.jsonl:0.5]",
            "eval.windows=null",
            "finetune.learning_rate=1e-4",
            "model.dtype=float32",
            "seed=11",
        ],
    )
    assert config.partition.sparsity == 0.125
    assert config.partition.method == "cmoe"
    assert config.partition.options == {"activation_top_k": 20}
    assert config.calibrate.data == ("a.jsonl:0.5", "b.jsonl:0.5")
    assert config.eval.windows is None
    assert config.finetune is not None
    assert config.finetune.learning_rate == 1e-4
    assert config.model == ModelConfig(path="models/tiny", dtype="float32")
    assert config.seed == 11


def test_the_last_override_wins_and_the_model_has_a_short_form(path: Path) -> None:
    config = load_run_config(path, ["model=other", "model.revision=v1", "seed=1", "seed=2"])
    assert config.model == ModelConfig(path="other", revision="v1")
    assert config.seed == 2


def test_an_equals_sign_in_a_value(path: Path) -> None:
    config = load_run_config(path, ["calibrate.data=['hf:name,split=train']"])
    assert config.calibrate.data == ("hf:name,split=train",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("partition.sparsity", "override 'partition.sparsity' has no '='"),
        ("partition.sparsity=[1", "override .* value is not YAML"),
        ("partition.sparsty=0.5", "partition.sparsty: Extra inputs are not permitted"),
        ("partition.sparsity=1.0", "partition.sparsity: Input should be less than 1"),
        ("partition.sparsity=half", "partition.sparsity: Input should be a valid number"),
        ("partition.num_experts=0", "partition.num_experts: Input should be greater than 0"),
        ("partition.allocation=odd", "partition.allocation: Input should be 'uniform', 'adaptive'"),
        ("partition=3", "partition: Input should be a valid dictionary"),
        ("calibrate.data=a.jsonl", "calibrate.data: Input should be a valid tuple"),
        ("calibrate.data=[]", "calibrate.data: Tuple should have at least 1 item"),
        ("bench.tokens=[0]", "bench.tokens.0: Input should be greater than 0"),
        ("model.dtype=int4", "model.dtype: Input should be 'auto', 'float32'"),
        ("pratition.sparsity=0.5", "pratition: Extra inputs are not permitted"),
        ("=3", "Extra inputs are not permitted"),
    ],
)
def test_values_that_do_not_fit(path: Path, override: str, message: str) -> None:
    with pytest.raises(WeaverError, match=message):
        load_run_config(path, [override])


def test_every_problem_is_named_at_once(path: Path) -> None:
    with pytest.raises(WeaverError, match=r"run\.yaml: ") as caught:
        load_run_config(path, ["partition.sparsity=2", "calibrate.tokens=-1"])
    assert "partition.sparsity" in caught.value.what
    assert "calibrate.tokens" in caught.value.what
    assert caught.value.why == "every value is checked before any work is done"


def test_known_keys_are_those_of_the_section(path: Path) -> None:
    with pytest.raises(WeaverError, match=r"tokns: .* did you mean tokens") as caught:
        load_run_config(path, ["calibrate.tokns=5"])
    assert caught.value.why.startswith("known keys are data, tokens, ")
    with pytest.raises(WeaverError, match="did you mean steps") as caught:
        load_run_config(path, ["finetune.phases=[{stps: 1}]"])
    assert "learning_rate" in caught.value.why
    with pytest.raises(WeaverError, match=r"pratition: .* did you mean partition") as caught:
        load_run_config(path, ["pratition.sparsity=0.5"])
    assert caught.value.why.startswith("known keys are model, seed, device, calibrate, ")


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    with pytest.raises(WeaverError, match="model: Field required"):
        load_run_config(tmp_path / "run.yaml")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match=r"run\.yaml: no such config file"):
        load_run_config(tmp_path / "run.yaml")
    with pytest.raises(WeaverError, match="no such config file"):
        load_run_config(tmp_path)


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00\x01", b"a: b: c"])
def test_a_file_that_is_not_yaml(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(WeaverError, match=r"run\.yaml: not valid YAML"):
        load_run_config(path)


def test_a_file_without_sections(path: Path) -> None:
    path.write_text("- a\n- b\n")
    with pytest.raises(WeaverError, match=r"run\.yaml: holds a list, not sections"):
        load_run_config(path)


def test_an_empty_file_is_a_file_without_values(path: Path) -> None:
    path.write_text("# nothing yet\n")
    assert load_section(EvalConfig, "eval", path, [], {}) == EvalConfig()


def test_flags_win_over_overrides_over_the_file_over_defaults(path: Path) -> None:
    def section(*overrides: str, **flags: object) -> PartitionConfig:
        return load_section(PartitionConfig, "partition", path, overrides, flags)

    assert section().sparsity == 0.5
    assert section("partition.sparsity=0.25").sparsity == 0.25
    assert section("partition.sparsity=0.25", sparsity=0.125).sparsity == 0.125
    assert section("partition.sparsity=0.25", sparsity=None).sparsity == 0.25
    assert section(num_experts=4).method == "cmoe"
    assert load_section(PartitionConfig, "partition", None, [], {}) == PartitionConfig()


def test_overrides_of_other_sections_are_left_to_them(path: Path) -> None:
    found = load_section(EvalConfig, "eval", path, ["partition.sparsity=7"], {"windows": 3})
    assert found == EvalConfig(windows=3)


def test_one_section_with_a_value_that_does_not_fit(path: Path) -> None:
    with pytest.raises(WeaverError, match="sparsity: Input should be greater than 0"):
        load_section(PartitionConfig, "partition", path, [], {"sparsity": -1.0})
    with pytest.raises(WeaverError, match="partition flags: sparsity"):
        load_section(PartitionConfig, "partition", None, [], {"sparsity": -1.0})
    path.write_text("partition: [1]\n")
    with pytest.raises(WeaverError, match="section partition is a list, not a mapping"):
        load_section(PartitionConfig, "partition", path, [], {})


def test_a_misspelt_section_is_noticed_by_every_stage(path: Path) -> None:
    path.write_text("pratition:\n  sparsity: 0.5\n")
    with pytest.raises(WeaverError, match="no section is called pratition") as caught:
        load_section(PartitionConfig, "partition", path, [], {})
    assert "partition" in caught.value.why
    with pytest.raises(WeaverError, match="no section is called evla"):
        load_section(PartitionConfig, "partition", None, ["evla.windows=3"], {})


def test_the_seed(path: Path) -> None:
    assert load_seed(None, [], None) == 0
    assert load_seed(path, [], None) == 7
    assert load_seed(path, ["seed=8"], None) == 8
    assert load_seed(path, ["seed=8"], 9) == 9
    assert load_seed(path, [], 0) == 0


@pytest.mark.parametrize("value", ["abc", "null", "1.5", "true"])
def test_a_seed_that_is_no_number(path: Path, value: str) -> None:
    path.write_text(f"seed: {value}\n")
    with pytest.raises(WeaverError, match=r"seed .* is not a whole number"):
        load_seed(path, [], None)


def test_the_device(path: Path) -> None:
    assert load_device(path, [], None) == "auto"
    path.write_text("device: cuda:1\n")
    assert load_run_config(path, ["model=tiny"]).device == "cuda:1"
    assert load_device(path, [], None) == "cuda:1"
    assert load_device(path, ["device=cuda"], None) == "cuda"
    assert load_device(path, ["device=cuda"], "cpu") == "cpu"


def test_a_device_that_is_no_text(path: Path) -> None:
    path.write_text("device: 1\n")
    with pytest.raises(WeaverError, match="device 1 is not a text"):
        load_device(path, [], None)


def test_parsing_a_mapping() -> None:
    found = parse_config(EvalConfig, {"windows": 2}, source="here")
    assert found.windows == 2
    with pytest.raises(WeaverError, match="here: wndows: Extra inputs are not permitted"):
        parse_config(EvalConfig, {"wndows": 2}, source="here")


@pytest.mark.parametrize(
    "value",
    [
        "[" * 5000,
        "{a: " * 5000,
        "2024-13-45",
        "2024-01-01T99:99:99",
        "0x",
        "9" * 6000,
        '"\\ud800"',
        "!!python/object:os.system x",
        "[&a [x, x], &b [*a, *a], &c [*b, *b], "
        + ", ".join(f"&{chr(100 + i)} [*{chr(99 + i)}, *{chr(99 + i)}]" for i in range(20))
        + "]",
    ],
)
def test_values_that_trip_the_library_up(path: Path, value: str) -> None:
    path.write_text(f"partition:\n  options: {value}\n", encoding="utf-8")
    with pytest.raises(WeaverError, match=r"not valid YAML|options"):
        load_run_config(path)
    with pytest.raises(WeaverError, match=r"not YAML|options"):
        load_run_config(None, ["model=m", f"partition.options={value}"])
