"""Model that ``assemble`` builds from layouts, routers and compensations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from tiny_conversions import ffns_of, load_converted, random_compensation
from tiny_runs import add_to_stage, run_config, run_stages

from weaver.artifacts.store import read_record, write_record
from weaver.artifacts.types import Compensation, ExpertLayout, Router
from weaver.config.sections import AssembleConfig, ModelConfig
from weaver.models.checkpoint import Checkpoint
from weaver.models.moe import MoEFeedForward
from weaver.rundir.inputs import COMPENSATION_FOLDER, read_compensation
from weaver.rundir.stage_folders import layer_path
from weaver.rundir.stage_run import StageContext
from weaver.stages.assemble import assemble


def test_intercepts_and_compensations_become_part_of_the_model(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run_stages(run_config(tiny_llama, router={"kind": "mean-gate"}), tmp_path, until="build-router")
    routers = tmp_path / "router"
    layouts = [
        read_record(layer_path(tmp_path / "partition", layer), ExpertLayout) for layer in range(4)
    ]
    experts = layouts[0].num_routed_experts
    whole = random_compensation(64, 32, experts)
    # Layer 0 has an intercept, 1 everything, 2 constants alone and 3 nothing.
    biased = replace(
        read_record(layer_path(routers, 0), Router), bias_E=torch.linspace(-1, 1, experts)
    )
    compensations = [None, whole, Compensation(expert_bias_ED=whole.expert_bias_ED), None]
    write_record(layer_path(routers, 0), biased)
    written = [layer_path(routers, 0)]
    for layer, compensation in enumerate(compensations):
        if compensation is not None:
            written.append(layer_path(routers / COMPENSATION_FOLDER, layer))
            write_record(written[-1], compensation)
    add_to_stage(routers, written)
    found = [read_compensation(routers, layer) for layer in range(4)]
    assert [None if each is None else set(each.tensors()) for each in found] == [
        None,
        {"down_FD", "output_bias_D", "expert_bias_ED"},
        {"expert_bias_ED"},
        None,
    ]

    manifest = assemble(StageContext(tmp_path), AssembleConfig())

    entries = json.loads((tmp_path / "model" / "config.json").read_text())["weaver"]["layers"]
    names = ("output_bias", "router_bias", "expert_bias")
    assert [[entry[name] for name in names] for entry in entries] == [
        [False, True, False],
        [True, False, True],
        [False, False, True],
        [False, False, False],
    ]
    model = load_converted(tmp_path / "model")
    checkpoint = Checkpoint(ModelConfig(path=str(tiny_llama)))
    for layer, ffn in enumerate(ffns_of(model)):
        expected = MoEFeedForward.convert(
            checkpoint.ffn(layer, torch.float32),
            layouts[layer],
            read_record(layer_path(routers, layer), Router),
            compensations[layer],
        )
        ours, theirs = ffn.state_dict(), expected.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert manifest.summary["total_parameters"] == counted
