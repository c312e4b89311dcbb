"""Every configuration in the repository is one that weaver accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from weaver.config.loading import load_run_config
from weaver.data.sources import BUILTIN, parse_data_spec
from weaver.methods.registry import METHODS, get_method, resolve_options
from weaver.methods.routers import ROUTERS
from weaver.models.writing import parse_size

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_loads_and_names_what_exists(path: Path) -> None:
    config = load_run_config(path)

    spec = get_method(config.partition.method)
    resolve_options(spec, config.partition.options)
    assert config.router.kind is None or config.router.kind in ROUTERS
    assert parse_size(config.assemble.max_shard_size) > 0
    finetune = config.finetune.data + (config.finetune.eval_data or ()) if config.finetune else ()
    for text in (*config.calibrate.data, *config.eval.data, *finetune):
        location = parse_data_spec(text).location
        if location.startswith("builtin:"):
            assert location.removeprefix("builtin:") in BUILTIN


def test_every_method_has_a_configuration_of_its_own() -> None:
    names = {path.stem: load_run_config(path).partition.method for path in CONFIGS}

    assert {method: names.get(f"smollm2-{method}") for method in METHODS} == {
        method: method for method in METHODS
    }
    assert "demo" in names


def test_the_methods_are_compared_on_equal_text_and_sparsity() -> None:
    configs = [
        load_run_config(path) for path in CONFIGS if path.stem in {f"smollm2-{m}" for m in METHODS}
    ]

    # How many FFN inputs a profile keeps is not a matter of text: weave fits regressions to them.
    # Nor is whether the domains of the text are kept apart, as DIVE needs them.
    same = {"input_sample_mb": 1.0, "groups": False}
    texts = [c.calibrate.model_copy(update=same) for c in configs]
    compared = zip(configs, texts, strict=True)
    assert len({(c.model, text, c.eval, c.partition.sparsity) for c, text in compared}) == 1
