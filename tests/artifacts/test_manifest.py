"""Fingerprints follow what decides a result; manifests of another kind are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weaver.artifacts.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    InputRef,
    ModelIdentity,
    StageManifest,
    StageRequest,
    git_commit,
    outputs_digest,
    peak_memory_bytes,
    read_manifest,
    versions,
    write_manifest,
)
from weaver.errors import WeaverError


def request(**changes: Any) -> StageRequest:
    values: dict[str, Any] = {
        "stage": "partition",
        "seed": 0,
        "config": {"method": "cmoe", "sparsity": 0.25, "options": {"a": 1, "b": [1, 2]}},
        "inputs": {"calibrate": InputRef(path="/runs/one/calibrate", digest="d1")},
    }
    return StageRequest(**values | changes)


def manifest() -> StageManifest:
    outputs = {"layer_000.safetensors": "aa", "layer_001.safetensors": "bb"}
    return StageManifest(
        request=request(),
        model=ModelIdentity(
            path="m",
            folder="/models/m",
            revision=None,
            trust_remote_code=False,
            model_type="llama",
            digest="dd",
            tokenizer_digest="tt",
            files={"model.safetensors": (10, 1_700_000_000_123_456_789)},
        ),
        outputs=outputs,
        digest=outputs_digest(outputs),
        summary={"layers": 2},
        dtype="float32",
        seconds=1.5,
        peak_memory_bytes=1000,
        versions=versions(),
        git_commit=None,
        finished_at="2026-01-01T00:00:00+00:00",
    )


def test_a_fingerprint_does_not_see_where_things_lie_or_the_order_of_keys() -> None:
    moved = {"calibrate": InputRef(path="/elsewhere", digest="d1")}
    assert request(inputs=moved).fingerprint == request().fingerprint
    config = request().config
    assert request(config=dict(reversed(config.items()))).fingerprint == request().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "build-router"},
        {"seed": 1},
        {"schema_version": SCHEMA_VERSION + 1},
        {"config": request().config | {"sparsity": 0.5}},
        {"config": request().config | {"extra": None}},
        {"config": request().config | {"options": {"a": 1, "b": [2, 1]}}},
        {"config": {k: v for k, v in request().config.items() if k != "method"}},
        {"inputs": {"calibrate": InputRef(path="/runs/one/calibrate", digest="d2")}},
        {"inputs": {"other": InputRef(path="/runs/one/calibrate", digest="d1")}},
        {"inputs": {}},
    ],
)
def test_a_fingerprint_sees_everything_else(changes: dict[str, Any]) -> None:
    assert request(**changes).fingerprint != request().fingerprint


def test_differences_name_every_key() -> None:
    asked = request(seed=3, config={"method": "cmoe", "sparsity": 0.5, "options": {"a": 1, "c": 2}})
    assert asked.differences(request()) == [
        "options.b: [1, 2] on disk, None asked for",
        "options.c: None on disk, 2 asked for",
        "seed: 0 on disk, 3 asked for",
        "sparsity: 0.25 on disk, 0.5 asked for",
    ]
    assert request().differences(request()) == []


def test_differences_name_the_entries_of_a_list_of_sections() -> None:
    asked, found = (
        request(config={"phases": [{"steps": 3, "lora": None}, {"steps": last}]}) for last in (2, 4)
    )
    assert asked.differences(found) == ["phases.2.steps: 4 on disk, 2 asked for"]


def test_changed_inputs() -> None:
    inputs = {
        "calibrate": InputRef(path="p", digest="d2"),
        "build-router": InputRef(path="p", digest="d3"),
    }
    assert request(inputs=inputs).changed_inputs(request()) == ["build-router", "calibrate"]
    same = {"calibrate": InputRef(path="other", digest="d1")}
    assert request(inputs=same).changed_inputs(request()) == []


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    found = read_manifest(tmp_path, rebuild="weaver partition")
    assert found == manifest()
    assert found.request.fingerprint == request().fingerprint


def test_outputs_digest_sees_names_and_contents() -> None:
    one = outputs_digest({"a": "1", "b": "2"})
    assert outputs_digest({"b": "2", "a": "1"}) == one
    assert outputs_digest({"a": "2", "b": "1"}) != one
    assert outputs_digest({"a": "1"}) != one


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(WeaverError, match=r"manifest\.json: missing"):
        read_manifest(tmp_path, rebuild="weaver partition")


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, "1"])
def test_a_manifest_of_another_schema(tmp_path: Path, version: object) -> None:
    raw = manifest().model_dump(mode="json")
    raw["request"]["schema_version"] = version
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(WeaverError, match=f"schema version {version}") as caught:
        read_manifest(tmp_path, rebuild="weaver partition --run-dir r")
    assert caught.value.why.endswith(f"schema version {SCHEMA_VERSION}")
    assert caught.value.fix == "make the stage again: weaver partition --run-dir r --force"


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"request": null}', '{"request": []}'])
def test_json_that_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(WeaverError, match="schema version None"):
        read_manifest(tmp_path, rebuild="weaver partition")


def test_a_damaged_manifest(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest())
    path = tmp_path / MANIFEST
    path.write_text(path.read_text()[:-20])
    with pytest.raises(WeaverError, match=r"manifest\.json: damaged"):
        read_manifest(tmp_path, rebuild="weaver partition")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seconds", "long", r"not a valid manifest, seconds: "),
        ("unknown", 1, r"not a valid manifest, unknown: "),
        ("request", {"schema_version": SCHEMA_VERSION}, r"not a valid manifest, request\.stage: "),
    ],
)
def test_a_manifest_changed_by_hand(tmp_path: Path, key: str, value: object, message: str) -> None:
    raw = manifest().model_dump(mode="json") | {key: value}
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(WeaverError, match=message):
        read_manifest(tmp_path, rebuild="weaver partition")


def test_circumstances() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "safetensors"} <= found.keys()
    assert 10**7 < peak_memory_bytes() < 10**12
    commit = git_commit()
    assert commit is None or len(commit) == 40
