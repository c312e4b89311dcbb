"""Calibrations that keep the groups of their data apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import run_config, run_stages

from weaver.artifacts.manifest import read_manifest
from weaver.artifacts.store import read_record
from weaver.artifacts.types import LayerProfile
from weaver.rundir.inputs import HELD_OUT_FILE, open_calibration, read_held_out, read_packed_tokens


def test_a_profile_has_the_moments_of_every_group(tiny_llama: Path, tmp_path: Path) -> None:
    calibrate = {"groups": True, "tokens": 1000, "sequence_length": 64}
    run_stages(run_config(tiny_llama, calibrate=calibrate), tmp_path / "run", until="calibrate")
    calibration = open_calibration(tmp_path / "run" / "calibrate")
    packed = read_packed_tokens(calibration.folder)
    groups = len(packed.groups)
    assert groups == 6
    assert calibration.config.groups
    # 15 windows fit into the tokens; each of six groups gets two.
    assert packed.input_ids_WT.shape == (12, 64)
    held_out = read_held_out(calibration.folder)
    assert held_out.groups_W.bincount().tolist() == [64] * 6
    for layer in range(4):
        profile = calibration.profile(layer)
        assert profile.group_tokens_G is not None
        assert profile.group_hidden_mean_GF is not None
        assert profile.group_tokens_G.tolist() == [128] * 6
        assert profile.group_hidden_mean_GF.shape == (6, 64)
        torch.testing.assert_close(
            profile.group_hidden_mean_GF.mean(0), profile.hidden_mean_F, rtol=1e-4, atol=1e-6
        )
        assert (profile.group_hidden_mean_GF.std(0) > 0).any()


def test_without_the_flag_nothing_is_new(tiny_llama: Path, tmp_path: Path) -> None:
    """Calibrations that earlier versions finished are still those of the same request."""
    run_stages(run_config(tiny_llama), tmp_path / "run", until="calibrate")
    folder = tmp_path / "run" / "calibrate"
    assert "groups" not in read_manifest(folder, rebuild="").request.config
    assert not (folder / HELD_OUT_FILE).exists()
    calibration = open_calibration(folder)
    assert not calibration.config.groups
    assert calibration.profile(0).group_tokens_G is None


@pytest.mark.parametrize("groups", [True, False])
def test_a_sequential_partition_profiles_as_the_calibration_did(
    tiny_llama: Path, tmp_path: Path, groups: bool
) -> None:
    config = run_config(
        tiny_llama, calibrate={"groups": groups}, partition={"method": "cmoe", "sequential": True}
    )
    run_stages(config, tmp_path / "run", until="partition")
    folder = tmp_path / "run" / "partition" / "profile"

    profile = read_record(folder / "layer_001.safetensors", LayerProfile)
    assert (profile.group_tokens_G is not None) == groups
